"""The operands of a served base: the B of every resident adapter in every layer, and the A of every basis.

The caller decides which adapter is in which slot.
"""

from collections.abc import Mapping, Sequence

import torch

from lori.basis import Basis
from lori.errors import AdapterError
from lori.identity import layer_of, natural_key
from lori.kernels import Operands
from lori.kernels.layout import MAX_RANK, UNIT
from lori.kernels.packed_modules import clear_modules, put_modules
from lori.kernels.pages import zeros
from lori.merge import blocks_of_layers
from lori.packed_adapter import Layouts, PackedAdapter


class AdapterPool:
    """Slots for adapters in the operands of the modules in `shapes`, (D, N) each, by full name.

    Adapters have at most rank `rank` and are on one of `bases`. Raises `AdapterError` if the kernels do not support the rank.
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
        self._layers = sorted({layer_of(name) for name in self._shapes}, key=natural_key)
        self._modules: dict[int, tuple[str, ...]] = {}  # modules that each slot's adapter changes

    def operands_of(self, names: Sequence[str]) -> list[Operands]:
        """Return the operands of the modules `names`; modules without operands are left out."""
        return [self._operands[name] for name in names if name in self._operands]

    def blocks(self, names: Sequence[str]) -> list[list[torch.Tensor]]:
        """Return the A (R, N) of every basis, for each of the modules `names` that has operands."""
        return [[basis.draw(n, self.rank, self._shapes[n][1]) for basis in self.bases] for n in names if n in self._operands]

    @property
    def layouts(self) -> Layouts:
        """Layout of the operands of every module, by full name. Adapters are packed for these layouts."""
        return {name: operands.layout for name, operands in self._operands.items()}

    def put(self, slot: int, adapter: PackedAdapter) -> None:
        """Put `adapter` into `slot`, which no running step may use. Raises `ValueError` if the adapter does not fit."""
        if adapter.basis not in self.bases:
            raise ValueError(f"{adapter.name!r} is on a basis ({adapter.basis}) that nothing was prepared for")
        put_modules(self._operands, slot, adapter.modules, self.bases.index(adapter.basis))
        self._modules[slot] = tuple(adapter.modules.layouts)

    def layer_weights(self, slot: int, block_weights: Sequence[float]) -> tuple[float, ...]:
        """Return the weight in each layer of the adapter in `slot`, from its `block_weights` as in `lori.merge.merge`.

        It is 0 in layers that the adapter does not change.
        """
        blocks = blocks_of_layers(self._modules[slot], len(block_weights))
        return tuple(block_weights[blocks[layer]] if layer in blocks else 0.0 for layer in self._layers)

    def clear(self, slot: int) -> None:
        """Empty a slot, which no running step may use."""
        self._modules.pop(slot, None)
        clear_modules(self._operands.values(), slot)

    def reserve(self, num_bytes: int) -> None:
        """Reserve `num_bytes` for all modules together, shared by their outputs, so that `put` seldom moves a pool.

        Call at start, before the first `put`.
        """
        total = sum(d for d, _ in self._shapes.values())
        sizes = [num_bytes * d // total // UNIT * UNIT for d, _ in self._shapes.values()]
        rooms = zeros(sum(sizes)).split(sizes) if self._device.type == "cpu" else None
        for number, operands in enumerate(self._operands.values()):
            if rooms is None or len(operands.pool):
                operands.reserve(sizes[number])
            else:
                operands.adopt_pool(rooms[number])

    @property
    def has_operands(self) -> bool:
        """Whether any module has operands."""
        return bool(self._operands)

    @property
    def num_moves(self) -> int:
        """Number of times that operands have moved, see `Operands.num_moves`."""
        return sum(operands.num_moves for operands in self._operands.values())

    @property
    def num_bytes(self) -> int:
        """Bytes that the operands of all slots hold."""
        return sum(operands.num_bytes for operands in self._operands.values())
