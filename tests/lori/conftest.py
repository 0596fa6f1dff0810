"""Fixtures for the tests of `lori`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lori.prompt_statistics import Background, PromptStatistics
from tests.lori.adapters import make_config, make_modules, save
from tests.lori.features import make_adapters, make_background
from tests.needs import need


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Limit torch to one thread. A second one does not speed up such small products, and on a busy machine takes seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["compiled", "numpy"])
def compiled_and_numpy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare features with the compiled module, and without it."""
    if request.param == "compiled":
        need("kernels")
    else:
        monkeypatch.setattr("lori.flat_index.MODULE", None)
        monkeypatch.setattr("lori.gaussians.MODULE", None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a sound adapter called math."""
    return save(tmp_path / "math", make_config(metrics={"loss": 1.25}), make_modules()) and tmp_path / "math"


@pytest.fixture(scope="session")
def background() -> Background:
    """Return the background of random features of prompts."""
    return make_background()


@pytest.fixture(scope="session")
def adapters(background: Background) -> list[PromptStatistics]:
    """Return the statistics of three adapters, whose prompts `tests.lori.features.draw` draws."""
    return make_adapters(background)
