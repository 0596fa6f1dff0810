"""One adapter's packed B of all modules in one piece, and functions that put it into a slot of all operands at once.

Putting module by module, torch's dispatcher alone takes several times as long as the copy. Shapes: W windows of a module.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from lori.device import to_device
from lori.kernels.layout import UNIT, Layout, Packed
from lori.kernels.operands import Operands
from lori.native import MODULE


@dataclass(frozen=True, slots=True)
class PackedModules:
    """The `Packed` of several modules, concatenated."""

    layouts: Mapping[str, Layout]
    """Layout of each module, by full name, in order."""
    blocks: torch.Tensor
    """Blocks of all modules, (bytes,) uint8."""
    starts: torch.Tensor
    """`Packed.starts` of all modules, (sum of W,) int32: relative to the first block of their module."""
    ends: tuple[int, ...]
    """End of each module's blocks in `blocks`, in units of 16 bytes."""

    @classmethod
    def from_modules(cls, packed: Mapping[str, Packed]) -> "PackedModules":
        """Concatenate `packed`, by module name."""
        ends = np.cumsum([len(module.blocks) // UNIT for module in packed.values()]).tolist()
        blocks, starts = ([getattr(module, part) for module in packed.values()] for part in ("blocks", "starts"))
        if not packed:
            return cls({}, torch.zeros(0, dtype=torch.uint8), torch.zeros(0, dtype=torch.int32), ())
        return cls({name: module.layout for name, module in packed.items()}, torch.cat(blocks), torch.cat(starts), tuple(ends))

    @property
    def by_module(self) -> dict[str, Packed]:
        """The `Packed` of each module, by name. Its arrays are views."""
        starts_by_module = self.starts.split([layout.num_windows for layout in self.layouts.values()])
        spans = pairwise((0, *self.ends))
        return {
            name: Packed(layout, self.blocks[first * UNIT : last * UNIT], starts)
            for (name, layout), starts, (first, last) in zip(self.layouts.items(), starts_by_module, spans, strict=True)
        }

    @property
    def num_bytes(self) -> int:
        """Bytes that the arrays take in memory."""
        return self.blocks.nbytes + self.starts.nbytes


def put_modules(operands: Mapping[str, Operands], slot: int, packed: PackedModules, basis: int) -> None:
    """Make `packed` the B of `slot` in `operands` (by module name), on the basis with index `basis` in s.

    Modules that are not in `packed` are cleared. Equivalent to `Operands.put` or `Operands.clear` for each module, with the same
    rules for threads. Raises `ValueError`, without any change, if there is no such slot or basis, or a module has no operands or
    another layout.
    """
    _check(operands, slot, packed, basis)
    clear_modules((target for name, target in operands.items() if name not in packed.layouts), slot)
    if MODULE and all(target.is_packed_on_cpu for target in operands.values()):
        _put_at_once(operands, slot, packed, basis)
        return
    device = next((target.pool.device for target in operands.values()), packed.blocks.device)
    blocks, starts = (to_device(tensor, device) for tensor in (packed.blocks, packed.starts))  # one transfer for each tensor
    on_device = PackedModules(packed.layouts, blocks, starts, packed.ends)
    for name, module in on_device.by_module.items():
        operands[name].put(slot, module, basis)


def clear_modules(operands: Iterable[Operands], slot: int) -> None:
    """Make the delta of `slot` zero in all `operands` and free its extents there."""
    for target in operands:
        target.clear(slot)


def _check(operands: Mapping[str, Operands], slot: int, packed: PackedModules, basis: int) -> None:
    """Raise `ValueError` if `packed` does not fit `slot` of `operands` on `basis`."""
    faults = [f"{name}: no operands" for name in packed.layouts if name not in operands]
    for name, layout in packed.layouts.items():
        target = operands.get(name)
        if target and ((layout is not target.layout and layout != target.layout) or not 0 <= slot < len(target.starts)):
            faults.append(f"{name}: {layout} for slot {slot} of {len(target.starts)}, expected {target.layout}")
    if basis < 0:
        faults.append(f"basis {basis}, expected one from 0")
    if faults:
        raise ValueError("; ".join(faults))


def _put_at_once(operands: Mapping[str, Operands], slot: int, packed: PackedModules, basis: int) -> None:
    assert MODULE
    rows, in_pieces = [], []
    first_unit = first_window = 0
    for (name, layout), end in zip(packed.layouts.items(), packed.ends, strict=True):
        target, length, num_windows = operands[name], end - first_unit, layout.num_windows
        place = target.allocate(slot, length)
        if place is None:
            in_pieces.append(name)
        else:
            pool, num_units, starts, basis_of = target.addresses(slot)
            rows.append((first_unit, length, first_window, num_windows, pool, num_units, place, starts, basis_of))
            target.num_bases = max(target.num_bases, basis + 1)
        first_unit, first_window = end, first_window + num_windows
    if rows:
        MODULE.put_adapter(packed.blocks.numpy(), packed.starts.numpy(), np.array(rows, dtype=np.int64), basis)
    by_module = packed.by_module if in_pieces else {}
    for name in in_pieces:
        operands[name].put(slot, by_module[name], basis)
