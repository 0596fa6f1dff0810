"""The program `python -m lori`, run in this process, and what its commands work on."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lori.base_model import load_base_model
from lori.basis import Seeded
from lori.cli.program import main
from lori.config import new_config
from tests.lori.adapters import make_config, make_modules, save

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the program in this process and returns its exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lori", *map(str, arguments)])
        try:
            code = main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capfd.readouterr()
        return code, out, err

    return call


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Return a store of three adapters in plain folders, on one basis."""
    for seed, name in enumerate(("math", "law", "code")):
        save(tmp_path / "store" / name, make_config(basis=Seeded()), make_modules(seed=seed))
    return tmp_path / "store"


@pytest.fixture
def tiny_adapter(tiny_model: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Return the tiny model, and a random adapter for it on the shared basis."""
    base = load_base_model(str(tiny_model), torch.float32)
    modules = make_modules(base.identity.shapes, ("q_proj", "down_proj"), rank=4, density=0.1)
    config = new_config(
        modules,
        Seeded(),
        base.identity,
        alphas=dict.fromkeys(modules, 8.0),
        target_modules=("q_proj", "down_proj"),
        templates=("chat",),
        training={},
    )
    save(tmp_path / "tiny", config, modules)
    return tiny_model, tmp_path / "tiny"
