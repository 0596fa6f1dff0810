"""Fixtures that more than one folder of tests uses."""

import faulthandler
import gc
import os
from collections.abc import Iterator
from pathlib import Path

# Every test works offline: whatever comes from outside must be there before.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

# Triton reads it when it is imported: without a GPU its kernels are interpreted.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from tests.tiny import save_tiny_model

# More threads than that wait for each other on a busy machine; the tensors are tiny.
torch.set_num_threads(1)

pytest_plugins = ("tests.needs",)


FIRST = ("test_demo_adapters.py", "test_docs.py", "test_serving.py", "test_nodes.py", "test_autoscaling.py")
"""Files that run for minutes, on what they have loaded once or with a cluster."""
NOT_FAST = ("slow", "model", "browser", "cluster", "interpreter", "sanitizer", "gpu")
"""Marks of tests that a run with `-m fast` leaves out."""

SERVERS = ("live", "served", "traced", "json_live", "narrow", "impatient", "attacked", "fuzzed", "cannot_start")
"""Fixtures that start a server as a process."""
FIXTURE_MARKS = {"browser": "browser", "demo": "model", **dict.fromkeys(SERVERS, "slow")}
"""Marks of the tests that use a fixture."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the fast tests, and put `FIRST` first, since an idle process takes over only another's last tests."""
    for item in items:
        for name in FIXTURE_MARKS.keys() & getattr(item, "fixturenames", ()):
            item.add_marker(FIXTURE_MARKS[name])
        if not any(item.get_closest_marker(name) for name in NOT_FAST):
            item.add_marker("fast")
    items.sort(key=lambda item: item.path.name not in FIRST)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Keep the garbage collector from what has been imported: each of its many runs looked at all of that."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    """Let the collector see again what the end of the process has to free."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_watchdog() -> Iterator[None]:
    """A server that runs in the test's own process, and dies or is stuck there, must not end the tests after it."""
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random Llama with a byte-level tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")
