"""The operands of a served base: the B of every resident adapter in every layer, and the A of every basis.

Which adapter lies in which slot is for others to say.
"""

from collections.abc import Mapping, Sequence

import torch

from lori.basis import Basis
from lori.errors import AdapterError
from lori.kernels import Operands
from lori.kernels.layout import MAX_RANK, UNIT
from lori.kernels.packed_modules import clear_modules, put_modules
from lori.kernels.pages import zeros
from lori.packed_adapter import Layouts, PackedAdapter


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
        self.bases, self.rank = tuple(bases), rank
        self._device = torch.device(device)
        self._shapes = dict(shapes) if rank and num_slots and bases else {}
        self._operands = {name: Operands(num_slots, rank, d, dtype, device) for name, (d, _) in self._shapes.items()}

    def operands_of(self, names: Sequence[str]) -> list[Operands]:
        """Return the operands of modules; none where there is nothing to add to them."""
        return [self._operands[name] for name in names if name in self._operands]

    def blocks(self, names: Sequence[str]) -> list[list[torch.Tensor]]:
        """Return the A (R, N) of every basis, for each of these modules that has operands."""
        return [[basis.draw(n, self.rank, self._shapes[n][1]) for basis in self.bases] for n in names if n in self._operands]

    @property
    def layouts(self) -> Layouts:
        """Of the operands of every module, by full name: what adapters are packed for."""
        return {name: operands.layout for name, operands in self._operands.items()}

    def put(self, slot: int, adapter: PackedAdapter) -> None:
        """Make `adapter` the one in `slot`, which no step that runs may use. Raises `ValueError` where it does not fit."""
        if adapter.basis not in self.bases:
            raise ValueError(f"{adapter.name!r} is on a basis ({adapter.basis}) that nothing was prepared for")
        put_modules(self._operands, slot, adapter.modules, self.bases.index(adapter.basis))

    def clear(self, slot: int) -> None:
        """Empty a slot, which no step that runs may use."""
        clear_modules(self._operands.values(), slot)

    def reserve(self, num_bytes: int) -> None:
        """Make room for so many bytes in all modules together, each its part, so that putting seldom moves a pool. At start."""
        total = sum(d for d, _ in self._shapes.values())
        sizes = [num_bytes * d // total // UNIT * UNIT for d, _ in self._shapes.values()]
        rooms = zeros(sum(sizes)).split(sizes) if self._device.type == "cpu" else None
        for number, operands in enumerate(self._operands.values()):
            if rooms is None or len(operands.pool):
                operands.reserve(sizes[number])
            else:
                operands.settle(rooms[number])

    @property
    def has_operands(self) -> bool:
        """Whether there is anything that could be added."""
        return bool(self._operands)

    @property
    def num_moves(self) -> int:
        """How often operands have moved, see `Operands.num_moves`."""
        return sum(operands.num_moves for operands in self._operands.values())

    @property
    def num_bytes(self) -> int:
        """What the operands of all slots hold, in bytes."""
        return sum(operands.num_bytes for operands in self._operands.values())
