"""Fixtures for the tests of the engine's adapters."""

import pytest

from tests.server.fake_loads import FakeLoader


@pytest.fixture
def loader() -> FakeLoader:
    return FakeLoader()
