"""Fixtures of the training's tests."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> Iterator[None]:
    """Each phase of a training ends with a garbage collection: it need not look at all that was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
