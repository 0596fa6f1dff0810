"""The operands of a served base: the B of every resident adapter in every layer, and the A of every basis.

Which adapter lies in which slot is for others to say.
"""

from collections.abc import Mapping, Sequence

import torch

from lori.adapter import Adapter
from lori.basis import Basis
from lori.errors import AdapterError
from lori.kernels import Operands, Packed
from lori.kernels.layout import MAX_RANK


class AdapterPool:
    """Slots for adapters in the operands of the modules `shapes`, (D, N) each, by full name.

    Adapters are of rank `rank` at most, on one of `bases`. Raises `AdapterError` where the kernels know no such rank.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        bases: Sequence[Basis],
        rank: int,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        if rank > MAX_RANK:
            raise AdapterError(f"the rank of an adapter is {rank}, expected at most {MAX_RANK}")
        self._bases, self._rank = list(bases), rank
        self._shapes = dict(shapes) if rank and num_slots and bases else {}
        self._operands = {name: Operands(num_slots, rank, d, dtype, device) for name, (d, _) in self._shapes.items()}

    def operands_of(self, names: Sequence[str]) -> list[Operands]:
        """Returns the operands of modules; none where there is nothing to add to them."""
        return [self._operands[name] for name in names if name in self._operands]

    def blocks(self, names: Sequence[str]) -> list[list[torch.Tensor]]:
        """Returns the A (R, N) of every basis, for each of these modules that has operands."""
        return [[basis.draw(n, self._rank, self._shapes[n][1]) for basis in self._bases] for n in names if n in self._operands]

    def pack(self, adapter: Adapter) -> Mapping[str, Packed]:
        """Returns the packed B of every module of `adapter`. Touches nothing of the pool: any thread may."""
        # A term's weight has alpha / r of most modules in it; where a module's own differs, its B makes up for it.
        scale = adapter.config.scale
        return {name: self._operands[name].pack(b, adapter.config.scale_of(name) / scale) for name, b in adapter.modules.items()}

    def put(self, slot: int, packed: Mapping[str, Packed], basis: Basis) -> None:
        """Makes `packed`, on `basis`, the adapter in `slot`, which no step that runs may use."""
        number = self._bases.index(basis)
        for name, operands in self._operands.items():
            if name in packed:
                operands.put(slot, packed[name], number)
            else:
                operands.clear(slot)

    def clear(self, slot: int) -> None:
        """Empties a slot, which no step that runs may use."""
        for operands in self._operands.values():
            operands.clear(slot)

    def reserve(self, num_bytes: Mapping[str, int]) -> None:
        """Makes room for so many bytes in each module, so that putting moves no pool."""
        for name, size in num_bytes.items():
            self._operands[name].reserve(size)

    def num_slot_bytes(self, slot: int) -> int:
        """Bytes of the adapter in `slot`."""
        return sum(operands.num_slot_bytes(slot) for operands in self._operands.values())

    @property
    def num_bytes(self) -> int:
        """What the operands of all slots hold, in bytes."""
        return sum(operands.num_bytes for operands in self._operands.values())
