"""Fixtures of tests with automatic weights."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.service.service import Service
from tests.server.keyed import ACME, served
from tests.server.service.weighed import make_service


@pytest.fixture(scope="session")
def weighing_service(writer_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Service:
    return make_service(writer_model, tmp_path_factory.mktemp("auto"))


@pytest.fixture(scope="session")
def weighing(weighing_service: Service) -> Iterator[httpx.Client]:
    """Yield a client of a server whose adapters `math` and `safety` have statistics of their prompts."""
    with served(weighing_service, ACME) as client:
        yield client
