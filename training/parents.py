"""The adapters that a run builds on: one to go on from, others whose entries it leaves alone.

Shapes: D outputs, R rank.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from lori.adapter import Adapter
from lori.basis import Explicit, Seeded
from lori.errors import LoriError
from lori.format import load_adapter
from lori.identity import BaseIdentity
from lori.sparse import ValueType
from training.config import FitConfig


class ParentError(LoriError):
    """An adapter cannot be built on: says what was found and what was expected."""


def load_parent(flag: str, folder: Path, config: FitConfig, base: BaseIdentity, modules: Sequence[str]) -> Adapter:
    """Return the adapter in `folder`, which `flag` names, to be gone on with in `modules`.

    Raises `ParentError` with all that differs from what `config` asks for, `AdapterFormatError` where it is no sound adapter.
    """
    adapter = load_adapter(folder, base)
    faults = _basis_faults(adapter, config)
    if odd := sorted(set(adapter.modules) ^ set(modules)):
        faults.append(f"differs from --target-modules in {', '.join(odd[:5])}" + (f" and {len(odd) - 5} more" if odd[5:] else ""))
    if ranks := {b.shape[1] for b in adapter.modules.values()} - {config.rank}:
        faults.append(f"has rank {min(ranks)}, expected --rank {config.rank}")
    faults += _scale_faults(adapter, adapter.modules, config)
    if flag == "--mask-from" and (adapter.config.lori.sparsity or adapter.config.lori.training.get("init_from")):
        faults.append("keeps a part of B alone, or began from another adapter; expected one of --method lori-d from zero")
    if flag == "--init-from" and config.method == "lori" and config.sparsity:
        faults += _rounding_faults(adapter, config)
    if faults:
        raise ParentError(f"{flag} {folder}: it " + "; it ".join(faults))
    return adapter


def load_avoided(
    config: FitConfig, base: BaseIdentity, shapes: Mapping[str, tuple[int, int]], start: Adapter | None
) -> list[Adapter]:
    """Return the adapters `config.avoid`, for one that goes on from `start` and has a B (D, R) of each of `shapes`.

    Raises `ParentError` with all for which a sum would not keep the values of both, `AdapterFormatError` where one is unsound.
    """
    adapters = [load_adapter(folder, base) for folder in config.avoid]
    said = []
    for folder, adapter in zip(config.avoid, adapters, strict=True):
        faults = _basis_faults(adapter, config)
        faults += _scale_faults(adapter, adapter.modules.keys() & shapes, config)
        faults += _shared_faults(adapter, start, config)
        said += [f"--avoid {folder}: it " + "; it ".join(faults)] if faults else []
    if said:
        raise ParentError("; ".join(said))
    return adapters


def entries_of(adapters: Sequence[Adapter], shapes: Mapping[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Return which entries of each B, (D, R) of `shapes`, any of `adapters` keeps, as a bool (D, R).

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


def _scale_faults(adapter: Adapter, modules: Iterable[str], config: FitConfig) -> list[str]:
    """Where scales differ, a merge puts them into B, and rounds it."""
    scale = config.alpha / config.rank
    scales = {adapter.config.scale_of(name) for name in modules} - {scale}
    return [f"has alpha/r = {min(scales):g}, expected --alpha / --rank = {scale:g}"] if scales else []


def _rounding_faults(adapter: Adapter, config: FitConfig) -> list[str]:
    """What a mask leaves out would not stay as it is; in int8 a row's values share a scale, with those that are new."""
    held = adapter.config.lori.values
    exact: list[ValueType] = ["float32"] if held in ("int8", "float32") else [held, "float32"]
    found = f"holds {held} values, which --values {config.values} would round again, expected --values {' or '.join(exact)}"
    return [] if config.values in exact else [found]


def _shared_faults(adapter: Adapter, start: Adapter | None, config: FitConfig) -> list[str]:
    """What is gone on from stays, and a sum would add to it; what is avoided may be `start` itself, whose entries stay so."""
    if start is None or adapter.config.lori.content_digest == start.config.lori.content_digest:
        return []
    taken = entries_of([adapter], {name: b.shape for name, b in start.modules.items()})
    num_shared = sum(int((b.mask & taken[name]).sum()) for name, b in start.modules.items())
    told = f"keeps {num_shared} entries that --init-from {config.init_from} keeps, too, and which would stay"
    return [f"{told}: expected none, or that adapter itself"] if num_shared else []
