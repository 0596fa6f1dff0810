"""Fixtures for the tests of the cluster."""

import pytest


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
