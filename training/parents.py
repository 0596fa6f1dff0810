"""The adapters that a run builds on: one to go on from, others whose entries it leaves alone.

Shapes: D outputs, R rank.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lori.adapter import Adapter
from lori.basis import Explicit, Seeded
from lori.errors import LoriError
from lori.format import load_adapter
from lori.identity import BaseIdentity
from training.config import FitConfig


class ParentError(LoriError):
    """An adapter cannot be built on: says what was found and what was expected."""


def load_parent(flag: str, folder: Path, config: FitConfig, base: BaseIdentity, modules: Sequence[str]) -> Adapter:
    """Returns the adapter in `folder`, which `flag` names, to be gone on with in `modules`.

    Raises `ParentError` with all that differs from what `config` asks for, `AdapterFormatError` where it is no sound adapter.
    """
    adapter = load_adapter(folder, base)
    faults = _basis_faults(adapter, config)
    if odd := sorted(set(adapter.modules) ^ set(modules)):
        faults.append(f"differs from --target-modules in {', '.join(odd[:5])}" + (f" and {len(odd) - 5} more" if odd[5:] else ""))
    if ranks := {b.shape[1] for b in adapter.modules.values()} - {config.rank}:
        faults.append(f"has rank {min(ranks)}, expected --rank {config.rank}")
    scale = config.alpha / config.rank
    if scales := {adapter.config.scale_of(name) for name in adapter.modules} - {scale}:
        faults.append(f"has alpha/r = {min(scales):g}, expected --alpha / --rank = {scale:g}")
    if flag == "--mask-from" and (adapter.config.lori.sparsity or adapter.config.lori.training.get("init_from")):
        faults.append("keeps a part of B alone, or began from another adapter; expected one of --method lori-d from zero")
    if faults:
        raise ParentError(f"{flag} {folder}: it " + "; it ".join(faults))
    return adapter


def load_avoided(config: FitConfig, base: BaseIdentity) -> list[Adapter]:
    """Returns the adapters `config.avoid`. Raises `ParentError` where one is on another basis, `AdapterFormatError`."""
    adapters = [load_adapter(folder, base) for folder in config.avoid]
    for folder, adapter in zip(config.avoid, adapters, strict=True):
        if faults := _basis_faults(adapter, config):
            raise ParentError(f"--avoid {folder}: it " + "; it ".join(faults))
    return adapters


def entries_of(adapters: Sequence[Adapter], shapes: Mapping[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Returns which entries of each B, (D, R) of `shapes`, any of `adapters` keeps, as a bool (D, R).

    A of a lower rank is the first rows of A, so ranks may differ.
    """
    taken = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}
    for adapter in adapters:
        for name in taken.keys() & adapter.modules.keys():
            found = adapter.modules[name].mask
            columns = min(found.shape[1], taken[name].shape[1])
            taken[name][:, :columns] |= found[:, :columns]
    return taken


def _basis_faults(adapter: Adapter, config: FitConfig) -> list[str]:
    if config.method == "lora":
        return [] if isinstance(adapter.basis, Explicit) else [f"is on the basis {adapter.basis}, expected a LoRA's own A"]
    basis = Seeded(config.basis_seed, config.stream)
    return [] if adapter.basis == basis else [f"is on the basis {adapter.basis}, expected {basis}"]
