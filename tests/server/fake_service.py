"""An app over a socket in the test's own process, with a fake for its engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import httpx
from transformers import PreTrainedTokenizerFast

from server.engine.adapters.registry import Registry
from server.engine.admission import Admission
from server.engine.engine import Engine
from server.engine.thread import EngineThread
from server.metrics import Metrics
from server.service import Service
from server.settings import Settings
from tests.server.live import serve_here
from tests.server.rig import FakeEngine


@contextmanager
def served(tokenizer: PreTrainedTokenizerFast, engine: FakeEngine, **settings: Any) -> Iterator[tuple[httpx.Client, Service]]:
    """Serves until the block ends; gives a client, and the service."""
    service = Service(
        settings=Settings(**settings),
        base_model="fake",
        registry=Registry([]),
        admission=Admission(tokenizer, Registry([]), 100),
        engine=EngineThread(cast(Engine, engine)),
        metrics=Metrics("fake"),
    )
    with serve_here(service) as client:
        yield client, service
