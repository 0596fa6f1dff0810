"""Small adapters for a base that is only a list of shapes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lori.adapter import Adapter
from lori.basis import Explicit, Seeded
from lori.config import UNSEALED, AdapterConfig, LoriSection, SeededConfig, basis_config, compact_shapes
from lori.format import load_adapter, save_adapter, seal
from lori.identity import BaseIdentity
from lori.prompt_statistics import NUM_FEATURES, STATISTICS_FILE, PromptStatistics
from lori.sparse import SparseB
from lori.store.store import AdapterStore
from tests.lori.features import spherical

# The masks are bitmaps of 27 bits, and of 48, which are whole bytes.
SHAPES = {
    "layers.0.q_proj": (9, 5),
    "layers.0.up_proj": (16, 7),
    "layers.0.o_proj": (5, 9),
    "layers.1.q_proj": (9, 5),
    "layers.1.up_proj": (16, 7),
}
TARGETS = ("q_proj", "up_proj")
BASE_DIGEST = "b" * 64
BASE = BaseIdentity("a/base", BASE_DIGEST, SHAPES)
RANK = 3


def targeted(shapes: Mapping[str, tuple[int, int]], targets: tuple[str, ...] = TARGETS) -> dict[str, tuple[int, int]]:
    """Return the modules of `shapes` (D, N) that an adapter on `targets` changes."""
    return {name: shape for name, shape in shapes.items() if name.rpartition(".")[2] in targets}


def make_modules(
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    targets: tuple[str, ...] = TARGETS,
    rank: int = RANK,
    seed: int = 0,
    density: float = 0.4,
) -> dict[str, SparseB]:
    """Return random sparse B for every targeted module."""
    g = torch.Generator().manual_seed(seed)
    modules = {}
    for name, (num_outputs, _) in targeted(shapes, targets).items():
        dense = torch.randn(num_outputs, rank, generator=g)
        modules[name] = SparseB.from_dense(dense, torch.rand(num_outputs, rank, generator=g) < density)
    return modules


def make_config(
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    targets: tuple[str, ...] = TARGETS,
    rank: int = RANK,
    alpha: float = 6.0,
    basis: Seeded = Seeded(seed=5, stream=1),  # noqa: B008 - frozen
    base_digest: str = BASE_DIGEST,
    **section: Any,
) -> AdapterConfig:
    """Return a valid config except for its digests. `section` has further fields of `lori`."""
    inputs = {name: (rank, num_inputs) for name, (_, num_inputs) in targeted(shapes, targets).items()}
    fields = {"sparsity": 0.6, "templates": ("chat",), "content_digest": UNSEALED, "config_digest": UNSEALED} | section
    return AdapterConfig(
        base_model_name_or_path="a/base",
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        lori=LoriSection(
            basis=basis_config(basis),
            shapes=compact_shapes(targeted(shapes, targets)),
            basis_digest=basis.digest(inputs),
            base_digest=base_digest,
            **fields,
        ),
    )


def save(folder: Path, config: AdapterConfig, modules: Mapping[str, SparseB], basis: Explicit | None = None) -> Adapter:
    """Save an adapter on `basis`, by default on the basis that `config` names."""
    if basis:
        section = config.lori.model_copy(update={"basis": basis_config(basis)})
        config = config.model_copy(update={"lori": section})
        return save_adapter(Adapter(folder.name, config, modules, basis), folder)
    assert isinstance(config.lori.basis, SeededConfig)
    return save_adapter(Adapter(folder.name, config, modules, config.lori.basis.basis()), folder)


def make_adapter(
    name: str,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    targets: tuple[str, ...] = TARGETS,
    rank: int = RANK,
    alpha: float = 6.0,
    basis: Seeded = Seeded(seed=5, stream=1),  # noqa: B008 - frozen
    seed: int = 0,
) -> Adapter:
    """Return a random adapter in memory."""
    config = make_config(shapes, targets, rank, alpha, basis, values="float32")
    return seal(Adapter(name, config, make_modules(shapes, targets, rank, seed), basis)).adapter


def fold(adapter: Adapter, module: str, num_inputs: int) -> torch.Tensor:
    """Return the delta of `adapter` at weight 1 to the weight of `module`: (alpha / r) B A, (D, N) fp64."""
    a = adapter.basis.draw(module, adapter.config.r, num_inputs).double()  # (R, N)
    return adapter.config.lora_alpha / adapter.config.r * adapter.modules[module].dense(torch.float64) @ a


def write_statistics(folder: Path, digest: str | None = None, background: str = "d" * 64) -> bytes:
    """Write statistics of the prompts of the adapter in `folder`, or of one whose content has `digest`. Return the file."""
    digest = digest or load_adapter(folder).config.lori.content_digest
    content = PromptStatistics(digest, background, spherical(np.zeros(NUM_FEATURES))).to_bytes()
    (folder / STATISTICS_FILE).write_bytes(content)
    return content


def make(folder: Path, seed: int = 0, **config: Any) -> Adapter:
    return save(folder, make_config(**config), make_modules(seed=seed))


def publish(store: AdapterStore, tmp_path: Path, name: str, seed: int = 0) -> str:
    """Publish a random adapter and return its version."""
    version = make(tmp_path / "made" / name, seed).version
    assert store.publish(tmp_path / "made" / name).version == version
    return version
