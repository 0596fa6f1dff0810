"""The B of every resident adapter for one module, in one flat pool of bytes that `layout` describes.

Shapes: D outputs, R rank, S slots, W windows.
"""

from itertools import accumulate, pairwise

import torch

from lori.kernels.extents import Extents
from lori.kernels.layout import UNIT, Layout, Packed, unpack
from lori.kernels.native import pack
from lori.sparse import SparseB

GROWTH = 8
"""A full pool grows by an eighth of its size, or by what is asked for where that is more."""


class Operands:
    """The windows of all slots: `pool` (bytes,) uint8, and `starts` (S, W) int32 where each begins, in 16 bytes (-1: empty).

    `basis_of` (S,) int32 says which block of s (T, A, R) a slot's B is applied to. Slots of one module are the same slots of all.
    Putting or clearing a slot moves no other. Raises `ValueError` where there is no kernel for the rank or the dtype.
    """

    def __init__(self, num_slots: int, rank: int, num_outputs: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.layout = Layout(num_outputs, rank, dtype)
        self.pool = torch.zeros(0, dtype=torch.uint8, device=device)
        self.starts = torch.full((num_slots, self.layout.num_windows), -1, dtype=torch.int32, device=device)
        self.basis_of = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self.num_bases = 1
        """Bases that s must have at least."""
        self.bound: object = None
        """What a kernel made of the arrays above; forgotten when the pool moves."""
        self._extents = Extents()
        self._taken: dict[int, list[tuple[int, int]]] = {}  # the stretches of each slot, start and length
        self._dense: torch.Tensor | None = None

    @classmethod
    def over(cls, layout: Layout, pool: torch.Tensor, starts: torch.Tensor, basis_of: torch.Tensor) -> "Operands":
        """Returns operands over arrays that others own, to be read only."""
        operands = cls(0, layout.rank, layout.num_outputs, layout.dtype, pool.device)
        operands.pool, operands.starts, operands.basis_of = pool, starts, basis_of
        return operands

    def pack(self, b: SparseB, scale: float = 1.0) -> Packed:
        """Packs scale * B (D, r), r <= R, for `put`. Touches nothing of these operands, so any thread may."""
        assert b.shape[0] == self.layout.num_outputs
        assert b.shape[1] <= self.layout.rank
        return pack(self.layout, b, scale)

    def put(self, slot: int, packed: Packed, basis: int) -> None:
        """Makes `packed` the B of `slot`, on the block `basis` of s."""
        self.clear(slot)
        starts = packed.starts.tolist()
        windows = [window for window, start in enumerate(starts) if start >= 0]
        begins = [*(starts[window] for window in windows), len(packed.blocks) // UNIT]
        lengths = [stop - start for start, stop in pairwise(begins)]
        row = torch.full((self.layout.num_windows,), -1, dtype=torch.int32)
        places = self._take(lengths)
        for window, start, place, length in zip(windows, begins, places, lengths, strict=False):
            self.pool[place * UNIT : (place + length) * UNIT] = packed.blocks[start * UNIT : (start + length) * UNIT]
            row[window] = place
        self._taken[slot] = list(zip(places, lengths, strict=True))
        self.starts[slot] = row
        self.basis_of[slot] = basis
        self.num_bases = max(self.num_bases, basis + 1)
        if self._dense is not None:
            self._dense[slot] = self._unpack(slot)

    def clear(self, slot: int) -> None:
        """Makes the delta of `slot` zero and frees its room in the pool."""
        for start, length in self._taken.pop(slot, []):
            self._extents.give(start, length)
        self.starts[slot] = -1
        if self._dense is not None:
            self._dense[slot] = 0

    def reserve(self, num_bytes: int) -> None:
        """Makes room for `num_bytes` of blocks in all, so that putting them moves the pool no more."""
        self._grow(-(-num_bytes // UNIT) - self._extents.size)

    @property
    def dense(self) -> torch.Tensor:
        """B of every slot, transposed, (S, R, D), for kernels that know no other form; kept from the first call on."""
        if self._dense is None:
            shape = (len(self.starts), self.layout.rank, self.layout.num_outputs)
            self._dense = torch.zeros(shape, dtype=self.layout.dtype, device=self.pool.device)
            for slot in (self.starts >= 0).any(dim=1).nonzero().flatten().tolist():
                self._dense[slot] = self._unpack(slot)
        return self._dense

    def num_slot_bytes(self, slot: int) -> int:
        """Bytes of a slot's blocks, 0 where it is empty."""
        return UNIT * sum(length for _, length in self._taken.get(slot, ()))

    @property
    def num_free_bytes(self) -> int:
        """Bytes of the pool that no slot uses."""
        return UNIT * self._extents.num_free

    @property
    def num_bytes(self) -> int:
        """What the operands hold, in bytes, room that is free included."""
        tensors = (self.pool, self.starts, self.basis_of, *([] if self._dense is None else [self._dense]))
        return sum(tensor.nbytes for tensor in tensors)

    def _unpack(self, slot: int) -> torch.Tensor:
        return unpack(self.layout, self.pool, self.starts[slot]).T.to(self.pool.device)

    def _take(self, lengths: list[int]) -> list[int]:
        # One stretch where there is one, so that a slot is read in one go; else a stretch for each window.
        whole = self._extents.take(sum(lengths)) if lengths else 0
        if whole is None:
            places = []
            for length in lengths:
                place = self._extents.take(length)
                if place is None:
                    break
                places.append(place)
            else:
                return places
            for place, length in zip(places, lengths, strict=False):
                self._extents.give(place, length)
            self._grow(max(sum(lengths), self._extents.size // GROWTH))
            whole = self._extents.take(sum(lengths))
            assert whole is not None
        return [whole + before for before in accumulate(lengths[:-1], initial=0)] if lengths else []

    def _grow(self, length: int) -> None:
        if length <= 0:
            return
        pool = torch.zeros((self._extents.size + length) * UNIT, dtype=torch.uint8, device=self.pool.device)
        pool[: len(self.pool)] = self.pool
        self._extents.grow(length)
        self.pool, self.bound = pool, None
