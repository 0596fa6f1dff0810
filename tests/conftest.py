"""Shared fixtures, and the order and marks of the tests."""

import faulthandler
import gc
import os
from collections.abc import Iterator
from pathlib import Path

# Every test works offline: downloads must be in the caches beforehand.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

# Triton reads this variable on import. Without a GPU its kernels are interpreted.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from tests.tiny import save_tiny_model

# The tensors are tiny, and more threads would wait for each other on a busy machine.
torch.set_num_threads(1)

pytest_plugins = ("tests.needs",)


FIRST = ("test_demo_adapters.py", "test_docs.py", "test_serving.py", "test_nodes.py", "test_autoscaling.py")
"""Test files that run for minutes: they share an expensive fixture, or start a cluster."""
NOT_FAST = ("slow", "model", "browser", "cluster", "interpreter", "sanitizer", "gpu")
"""Marks that exclude a test from a run with `-m fast`."""

SERVERS = ("live", "served", "traced", "json_live", "narrow", "impatient", "attacked", "fuzzed", "cannot_start")
"""Fixtures that start a server in a process of its own."""
FIXTURE_MARKS = {"browser": "browser", "demo": "model", **dict.fromkeys(SERVERS, "slow")}
"""Fixtures, each with the mark of the tests that use it."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the fast tests, and run `FIRST` first. An idle worker of xdist takes over only the last tests of another one."""
    for item in items:
        for name in FIXTURE_MARKS.keys() & getattr(item, "fixturenames", ()):
            item.add_marker(FIXTURE_MARKS[name])
        if not any(item.get_closest_marker(name) for name in NOT_FAST):
            item.add_marker("fast")
    items.sort(key=lambda item: item.path.name not in FIRST)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Exclude all imported objects from garbage collection. Each of its many runs would traverse them."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    """Return the excluded objects to the collector, so that the end of the process frees them."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_watchdog() -> Iterator[None]:
    """Cancel the watchdog of a server that died or hung in the test process, so that it does not end a later test."""
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny random Llama model with a byte-level tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")
