"""Parent adapters of a run: one to start from, one to take the mask from, and others whose entries are avoided.

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
    """An adapter that a run cannot build on. The message says what was found and what was expected."""


def load_parent(flag: str, folder: Path, config: FitConfig, base: BaseIdentity, modules: Sequence[str]) -> Adapter:
    """Return the adapter in `folder`, for a run that builds on it in `modules`. `flag` is the flag that names the folder.

    Raises `ParentError` with all differences from `config`, and `AdapterFormatError` if the adapter is unsound.
    """
    adapter = load_adapter(folder, base)
    faults = _basis_faults(adapter, config)
    if differing := sorted(set(adapter.modules) ^ set(modules)):
        faults.append(
            f"differs from --target-modules in {', '.join(differing[:5])}"
            + (f" and {len(differing) - 5} more" if differing[5:] else "")
        )
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
    """Return the adapters `config.avoid`, for a new adapter that starts from `start` and has a B (D, R) of each of `shapes`.

    Raises `ParentError` if the sum of the new adapter and an avoided one would not keep the values of both, and
    `AdapterFormatError` if one is unsound.
    """
    adapters = [load_adapter(folder, base) for folder in config.avoid]
    messages = []
    for folder, adapter in zip(config.avoid, adapters, strict=True):
        faults = _basis_faults(adapter, config)
        faults += _scale_faults(adapter, adapter.modules.keys() & shapes, config)
        faults += _overlap_faults(adapter, start, config)
        messages += [f"--avoid {folder}: it " + "; it ".join(faults)] if faults else []
    if messages:
        raise ParentError("; ".join(messages))
    return adapters


def nonzero_entries(adapters: Sequence[Adapter], shapes: Mapping[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Return, for each B (D, R) of `shapes`, a bool (D, R): the entries that the mask of any of `adapters` keeps.

    Ranks may differ, since A of a lower rank is the first rows of A of a higher one.
    """
    nonzero = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}
    for adapter in adapters:
        for name in nonzero.keys() & adapter.modules.keys():
            mask = adapter.modules[name].mask
            columns = min(mask.shape[1], nonzero[name].shape[1])
            nonzero[name][:, :columns] |= mask[:, :columns]
    return nonzero


def _basis_faults(adapter: Adapter, config: FitConfig) -> list[str]:
    if config.method == "lora":
        return [] if isinstance(adapter.basis, Explicit) else [f"is on the basis {adapter.basis}, expected a LoRA's own A"]
    basis = Seeded(config.basis_seed, config.stream)
    return [] if adapter.basis == basis else [f"is on the basis {adapter.basis}, expected {basis}"]


def _scale_faults(adapter: Adapter, modules: Iterable[str], config: FitConfig) -> list[str]:
    """Return a fault if scales differ: a merge would then multiply B by the scale, and round it."""
    scale = config.alpha / config.rank
    scales = {adapter.config.scale_of(name) for name in modules} - {scale}
    return [f"has alpha/r = {min(scales):g}, expected --alpha / --rank = {scale:g}"] if scales else []


def _rounding_faults(adapter: Adapter, config: FitConfig) -> list[str]:
    """Return a fault if storing would change entries outside of the mask, which must stay as they are.

    An int8 row has one scale for all of its values, so new values in a row would round its old ones again.
    """
    stored = adapter.config.lori.values
    exact: list[ValueType] = ["float32"] if stored in ("int8", "float32") else [stored, "float32"]
    fault = f"holds {stored} values, which --values {config.values} would round again, expected --values {' or '.join(exact)}"
    return [] if config.values in exact else [fault]


def _overlap_faults(adapter: Adapter, start: Adapter | None, config: FitConfig) -> list[str]:
    """Return a fault if the avoided `adapter` shares entries with `start`.

    The entries of `start` stay in the new adapter, so a sum would add the avoided adapter's values to them. `adapter` may be
    `start` itself: all of its entries then stay unchanged.
    """
    if start is None or adapter.config.lori.content_digest == start.config.lori.content_digest:
        return []
    avoided = nonzero_entries([adapter], {name: b.shape for name, b in start.modules.items()})
    num_shared = sum(int((b.mask & avoided[name]).sum()) for name, b in start.modules.items())
    fault = f"keeps {num_shared} entries that --init-from {config.init_from} keeps, too, and which would stay"
    return [f"{fault}: expected none, or that adapter itself"] if num_shared else []
