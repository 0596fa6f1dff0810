"""Small adapters for a base that is only a list of shapes."""

from collections.abc import Mapping
from typing import Any

import torch

from lori.adapter import Adapter
from lori.basis import Seeded
from lori.config import AdapterConfig, LoriSection, SeededConfig, compact
from lori.identity import BaseIdentity
from lori.sparse import SparseB

# Bitmaps of 27 bits, and of 48, which are whole bytes.
SHAPES = {
    "layers.0.q_proj": (9, 5),
    "layers.0.up_proj": (16, 7),
    "layers.0.o_proj": (5, 9),
    "layers.1.q_proj": (9, 5),
    "layers.1.up_proj": (16, 7),
}
TARGETS = ("q_proj", "up_proj")
BASE_DIGEST = "b" * 64
BASE = BaseIdentity(BASE_DIGEST, SHAPES)
RANK = 3


def targeted(shapes: Mapping[str, tuple[int, int]], targets: tuple[str, ...] = TARGETS) -> dict[str, tuple[int, int]]:
    """Returns those of `shapes` (D, N) that an adapter on `targets` changes."""
    return {name: shape for name, shape in shapes.items() if name.rpartition(".")[2] in targets}


def make_modules(
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    targets: tuple[str, ...] = TARGETS,
    rank: int = RANK,
    seed: int = 0,
    density: float = 0.4,
) -> dict[str, SparseB]:
    """Returns random sparse B for every targeted module."""
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
    """Returns a sound config, but for its digests; `section` are more fields of `lori`."""
    inputs = {name: (rank, num_inputs) for name, (_, num_inputs) in targeted(shapes, targets).items()}
    fields = {"sparsity": 0.6, "templates": ("chat",)} | section
    return AdapterConfig(
        base_model_name_or_path="a/base",
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        lori=LoriSection(
            basis=SeededConfig.of(basis),
            shapes=compact(targeted(shapes, targets)),
            basis_digest=basis.digest(inputs),
            base_digest=base_digest,
            **fields,
        ),
    )


def make_adapter(
    name: str,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    targets: tuple[str, ...] = TARGETS,
    rank: int = RANK,
    alpha: float = 6.0,
    basis: Seeded = Seeded(seed=5, stream=1),  # noqa: B008 - frozen
    seed: int = 0,
) -> Adapter:
    """Returns a random adapter in memory."""
    return Adapter(name, make_config(shapes, targets, rank, alpha, basis), make_modules(shapes, targets, rank, seed), basis)


def fold(adapter: Adapter, module: str, num_inputs: int) -> torch.Tensor:
    """Returns what `adapter` at weight 1 adds to the weight of `module`: (alpha / r) B A, (D, N) fp64."""
    a = adapter.basis.draw(module, adapter.config.r, num_inputs).double()  # (R, N)
    return adapter.config.lora_alpha / adapter.config.r * adapter.modules[module].dense(torch.float64) @ a
