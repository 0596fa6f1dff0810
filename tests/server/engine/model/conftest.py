"""Fixtures for the tests of a model's kernels."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from server.engine.model import triton_ops
from tests.interpreter import mend


@pytest.fixture
def mended_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton interprets, which takes long: keys are split in fewer parts. A device does not warn of infinity less infinity."""
    mend(monkeypatch)
    monkeypatch.setattr(triton_ops, "PROGRAMS", 8)
    with np.errstate(invalid="ignore"):
        yield


@pytest.fixture
def num_threads() -> Iterator[Callable[[int], None]]:
    """One thread, and what sets another number for one test."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)
