"""The adapters that a run builds on: one to go on from, others whose entries it leaves alone.

Shapes: D outputs, R rank.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lori.adapter import Adapter
from lori.basis import Basis, Seeded
from lori.errors import LoriError
from lori.format import load_adapter
from lori.identity import BaseIdentity
from lori.sparse import SparseB
from training.config import FitConfig


class ParentError(LoriError):
    """An adapter cannot be built on: says what was found and what was expected."""


def load_start(config: FitConfig, base: BaseIdentity, modules: Sequence[str]) -> dict[str, SparseB]:
    """Returns B of `modules` of the adapter `config.init_from`.

    Raises `ParentError` with all that differs from what `config` asks for, `AdapterFormatError` where it is no sound adapter.
    """
    assert config.init_from
    adapter = load_adapter(config.init_from, base)
    faults = _basis_faults(adapter, Seeded(config.basis_seed, config.stream))
    if odd := sorted(set(adapter.modules) ^ set(modules)):
        faults.append(f"differs from --target-modules in {', '.join(odd[:5])}" + (f" and {len(odd) - 5} more" if odd[5:] else ""))
    if ranks := {b.shape[1] for b in adapter.modules.values()} - {config.rank}:
        faults.append(f"has rank {min(ranks)}, expected --rank {config.rank}")
    scale = config.alpha / config.rank
    if scales := {adapter.config.scale_of(name) for name in adapter.modules} - {scale}:
        faults.append(f"has alpha/r = {min(scales):g}, expected --alpha / --rank = {scale:g}")
    if faults:
        raise ParentError(f"--init-from {config.init_from}: it " + "; it ".join(faults))
    return dict(adapter.modules)


def load_avoided(
    folders: Sequence[Path], base: BaseIdentity, basis: Basis, shapes: Mapping[str, tuple[int, int]]
) -> dict[str, torch.Tensor]:
    """Returns which entries of each B, (D, R) of `shapes`, the adapters in `folders` keep, as a bool (D, R).

    A of a lower rank is the first rows of A, so ranks may differ. Raises `ParentError` where one is on another basis,
    `AdapterFormatError`.
    """
    taken = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}
    for folder in folders:
        adapter = load_adapter(folder, base)
        if faults := _basis_faults(adapter, basis):
            raise ParentError(f"--avoid {folder}: it " + "; it ".join(faults))
        for name in taken.keys() & adapter.modules.keys():
            found = adapter.modules[name].mask
            columns = min(found.shape[1], taken[name].shape[1])
            taken[name][:, :columns] |= found[:, :columns]
    return taken


def _basis_faults(adapter: Adapter, basis: Basis) -> list[str]:
    return [] if adapter.basis == basis else [f"is on the basis {adapter.basis}, expected {basis}"]
