"""An app on a socket of the test's own process, with a fake engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from transformers import PreTrainedTokenizerFast

from server.service.service import Service
from tests.server.keyed import make_service
from tests.server.live import serve_here
from tests.server.rig import FakeEngine


@contextmanager
def served(
    tokenizer: PreTrainedTokenizerFast, engine: FakeEngine, keys: Path | None = None, **settings: Any
) -> Iterator[tuple[httpx.Client, Service]]:
    """Serve until the block ends; yield a client and the service."""
    service = make_service(tokenizer, keys, engine=engine, **settings)
    with serve_here(service) as client:
        yield client, service
