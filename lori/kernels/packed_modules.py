"""One adapter's packed B of all its modules in one piece, and how it is put in a slot of their operands at once.

Module by module, torch's dispatcher alone would take several times as long as copying the bytes. Shapes: W windows of a module.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from lori.device import to_device
from lori.kernels.layout import UNIT, Layout, Packed
from lori.kernels.native import MODULE
from lori.kernels.operands import Operands


@dataclass(frozen=True, slots=True)
class PackedModules:
    """The `Packed` of several modules, one after the other."""

    layouts: Mapping[str, Layout]
    """Of each module, by full name, in order."""
    blocks: torch.Tensor
    """(bytes,) uint8."""
    starts: torch.Tensor
    """(sum of W,) int32, each as in `Packed`: from the first block of its module."""
    ends: tuple[int, ...]
    """Where the blocks of each module end, in units of 16 bytes."""

    @classmethod
    def of(cls, packed: Mapping[str, Packed]) -> "PackedModules":
        """Return `packed`, by module, in one piece."""
        ends = np.cumsum([len(of.blocks) // UNIT for of in packed.values()]).tolist()
        blocks, starts = ([getattr(of, part) for of in packed.values()] for part in ("blocks", "starts"))
        if not packed:
            return cls({}, torch.zeros(0, dtype=torch.uint8), torch.zeros(0, dtype=torch.int32), ())
        return cls({name: of.layout for name, of in packed.items()}, torch.cat(blocks), torch.cat(starts), tuple(ends))

    @property
    def by_module(self) -> dict[str, Packed]:
        """The `Packed` of each module: views of the arrays here."""
        starts = self.starts.split([layout.num_windows for layout in self.layouts.values()])
        spans = pairwise((0, *self.ends))
        return {
            name: Packed(layout, self.blocks[first * UNIT : last * UNIT], of)
            for (name, layout), of, (first, last) in zip(self.layouts.items(), starts, spans, strict=True)
        }

    @property
    def num_bytes(self) -> int:
        """What it holds in memory, in bytes."""
        return self.blocks.nbytes + self.starts.nbytes


def put_modules(operands: Mapping[str, Operands], slot: int, packed: PackedModules, basis: int) -> None:
    """Make `packed` the B of `slot` in `operands`, by module, on the block `basis` of s; modules that it lacks are cleared.

    The same as `Operands.put` and `Operands.clear` of each, and for the same thread. Raises `ValueError`, and has changed nothing
    then, where there is no such slot or basis, or a module is not among the operands or of another layout.
    """
    _check(operands, slot, packed, basis)
    clear_modules((of for name, of in operands.items() if name not in packed.layouts), slot)
    if MODULE and all(of.is_plain for of in operands.values()):
        _put_at_once(operands, slot, packed, basis)
        return
    device = next((of.pool.device for of in operands.values()), packed.blocks.device)
    blocks, starts = (to_device(of, device) for of in (packed.blocks, packed.starts))  # one transfer of each
    there = PackedModules(packed.layouts, blocks, starts, packed.ends)
    for name, of in there.by_module.items():
        operands[name].put(slot, of, basis)


def clear_modules(operands: Iterable[Operands], slot: int) -> None:
    """Make the delta of `slot` zero in all `operands`, and frees its room there."""
    for of in operands:
        of.clear(slot)


def _check(operands: Mapping[str, Operands], slot: int, packed: PackedModules, basis: int) -> None:
    """Raise `ValueError` where `packed` does not fit `slot` of `operands` on `basis`."""
    faults = [f"{name}: no operands" for name in packed.layouts if name not in operands]
    for name, layout in packed.layouts.items():
        of = operands.get(name)
        if of and ((layout is not of.layout and layout != of.layout) or not 0 <= slot < len(of.starts)):
            faults.append(f"{name}: {layout} for slot {slot} of {len(of.starts)}, expected {of.layout}")
    if basis < 0:
        faults.append(f"basis {basis}, expected one from 0")
    if faults:
        raise ValueError("; ".join(faults))


def _put_at_once(operands: Mapping[str, Operands], slot: int, packed: PackedModules, basis: int) -> None:
    assert MODULE
    rows, in_pieces = [], []
    first_unit = first_window = 0
    for (name, layout), end in zip(packed.layouts.items(), packed.ends, strict=True):
        of, length, num_windows = operands[name], end - first_unit, layout.num_windows
        place = of.take(slot, length)
        if place is None:
            in_pieces.append(name)
        else:
            pool, num_units, starts, basis_of = of.addresses(slot)
            rows.append((first_unit, length, first_window, num_windows, pool, num_units, place, starts, basis_of))
            of.num_bases = max(of.num_bases, basis + 1)
        first_unit, first_window = end, first_window + num_windows
    if rows:
        MODULE.put_adapter(packed.blocks.numpy(), packed.starts.numpy(), np.array(rows, dtype=np.int64), basis)
    by_module = packed.by_module if in_pieces else {}
    for name in in_pieces:
        operands[name].put(slot, by_module[name], basis)
