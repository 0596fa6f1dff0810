"""The B of every resident adapter for one module, in one flat pool of bytes that `layout` describes.

Shapes: D outputs, R rank, S slots, W windows.
"""

from bisect import bisect_left
from itertools import pairwise

import torch

from lori.kernels.layout import UNIT, Layout, Packed, unpack
from lori.kernels.native import MODULE, pack
from lori.sparse import SparseB


class Extents:
    """The free stretches of `size` units, ascending; neighbours are one."""

    def __init__(self, size: int = 0) -> None:
        self.size = 0
        self._free: list[tuple[int, int]] = []  # start, length
        self.grow(size)

    @property
    def num_free(self) -> int:
        """Units that are free."""
        return sum(length for _, length in self._free)

    def take(self, length: int) -> int | None:
        """Take the first stretch of `length` units that is free and return its start, or `None` where there is none."""
        for i, (start, free) in enumerate(self._free):
            if free >= length:
                self._free[i : i + 1] = [(start + length, free - length)] if free > length else []
                return start
        return None

    def give(self, start: int, length: int) -> None:
        """Make a stretch that was taken free again."""
        at = bisect_left(self._free, (start, 0))
        stop, first, last = start + length, at, at
        assert 0 <= start < stop <= self.size
        if at > 0 and sum(self._free[at - 1]) >= start:
            assert sum(self._free[at - 1]) == start
            first, start = at - 1, self._free[at - 1][0]
        if at < len(self._free) and self._free[at][0] <= stop:
            assert self._free[at][0] == stop
            last, stop = at + 1, sum(self._free[at])
        self._free[first:last] = [(start, stop - start)]

    def grow(self, length: int) -> None:
        """Add `length` free units at the end."""
        if length > 0:
            self.size += length
            self.give(self.size - length, length)


GROWTH = 8
"""A full pool grows by an eighth of its size, or by what is asked for where that is more."""


class Operands:
    """The windows of all slots: `pool` (bytes,) uint8, and `starts` (S, W) int32 where each begins, in 16 bytes (-1: empty).

    `basis_of` (S,) int32 says which block of s (T, A, R) a slot's B is applied to. Slots of one module are the same slots of all.
    Putting or clearing a slot moves no other; neither may run while a step reads the pool. Raises `ValueError` where there is no
    kernel for the rank or the dtype.
    """

    def __init__(self, num_slots: int, rank: int, num_outputs: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.layout = Layout(num_outputs, rank, dtype)
        with torch.inference_mode(False):  # an inference tensor could not be changed outside of inference mode
            self.pool = torch.zeros(0, dtype=torch.uint8, device=device)
            self.starts = torch.full((num_slots, self.layout.num_windows), -1, dtype=torch.int32, device=device)
            self.basis_of = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self.is_cpu = self.pool.is_cpu
        self.num_bases = 1
        """Bases that s must have at least."""
        self.bound: object = None
        """What a kernel made of the arrays above; forgotten when the pool moves."""
        self.packed_tokens: dict[int, float] = {}
        """What a kernel remembers of slots; forgotten when a slot changes."""
        self.num_moves = 0
        """How often the pool has moved: what was captured with its address is right no more."""
        self._extents = Extents()
        self._taken: dict[int, list[tuple[int, int]]] = {}  # the stretches of each slot, start and length
        self._dense: torch.Tensor | None = None
        if MODULE is None and self.pool.device.type == "cpu":
            self._dense = self._make_dense()  # at start, since the first step will ask for it

    @classmethod
    def over(
        cls, layout: Layout, pool: torch.Tensor, starts: torch.Tensor, basis_of: torch.Tensor, num_bases: int = 1
    ) -> "Operands":
        """Return operands over arrays that others own, to be read only; no slot of theirs is taken for long segments."""
        operands = cls(0, layout.rank, layout.num_outputs, layout.dtype, pool.device)
        operands.pool, operands.starts, operands.basis_of, operands.num_bases = pool, starts, basis_of, num_bases
        operands._dense = None
        return operands

    def pack(self, b: SparseB, scale: float = 1.0) -> Packed:
        """Pack scale * B (D, r), r <= R, for `put`. Touches nothing of these operands, so any thread may."""
        assert b.shape[0] == self.layout.num_outputs
        assert b.shape[1] <= self.layout.rank
        return pack(self.layout, b, scale)

    def put(self, slot: int, packed: Packed, basis: int) -> None:
        """Make `packed` the B of `slot`, on the block `basis` of s. Raises `ValueError` where there is no such slot or basis, or
        `packed` is of another layout."""
        if packed.layout != self.layout or not 0 <= slot < len(self.starts) or basis < 0:
            found = f"{packed.layout} for slot {slot} of {len(self.starts)} on basis {basis}"
            raise ValueError(f"{found}; expected {self.layout}, a slot that is there and a basis from 0")
        length = len(packed.blocks) // UNIT
        place = self.take(slot, length)
        if place is None:
            self._put_in_pieces(slot, packed)
        else:
            self.pool[place * UNIT : (place + length) * UNIT] = packed.blocks
            self.starts[slot] = packed.starts + torch.where(packed.starts < 0, 0, place)
        self.basis_of[slot] = basis
        self.num_bases = max(self.num_bases, basis + 1)
        if self._dense is not None:
            self._dense[slot] = self._unpack(slot)

    def take(self, slot: int, length: int) -> int | None:
        """Take `length` units of room in one piece for `slot`, in place of what it had, and return where it begins.

        The pool grows where it has less room than that; `None` where it has as much, in pieces. Who asks writes the blocks,
        `starts` and `basis_of`.
        """
        self._forget(slot)
        place = self._extents.take(length) if length else 0
        if place is None and length > self._extents.num_free:
            self._grow(max(length, self._extents.size // GROWTH))
            place = self._extents.take(length)
        if place is not None and length:
            self._taken[slot] = [(place, length)]
        return place

    @property
    def is_plain(self) -> bool:
        """Whether the arrays here lie in the memory of the CPU and are all there is: no dense B is kept beside them."""
        return self.is_cpu and self._dense is None

    def addresses(self, slot: int) -> tuple[int, int, int, int]:
        """Return the address of the pool, its size in units, and the addresses of what `slot` has in `starts` and `basis_of`.

        They are valid until the pool moves.
        """
        starts = self.starts.data_ptr() + slot * self.layout.num_windows * 4
        return self.pool.data_ptr(), self._extents.size, starts, self.basis_of.data_ptr() + slot * 4

    def clear(self, slot: int) -> None:
        """Make the delta of `slot` zero and frees its room in the pool."""
        self._forget(slot)
        # Past torch's dispatcher where that can be, since an adapter has hundreds of modules.
        (self.starts.numpy() if self.is_cpu else self.starts)[slot] = -1
        if self._dense is not None:
            self._dense[slot] = 0

    def _forget(self, slot: int) -> None:
        # Frees its room; `starts` still names it.
        self.packed_tokens.pop(slot, None)
        for start, length in self._taken.pop(slot, ()):
            self._extents.give(start, length)

    def reserve(self, num_bytes: int) -> None:
        """Make room for `num_bytes` of blocks in all, so that putting them moves the pool no more."""
        self._grow(-(-num_bytes // UNIT) - self._extents.size)

    def settle(self, room: torch.Tensor) -> None:
        """Make `room` (bytes,) uint8, zeros of the caller's that start at a multiple of 16, the pool, which must be empty."""
        assert not self._extents.size
        assert not len(room) % UNIT
        self._extents.grow(len(room) // UNIT)
        self.pool, self.bound = room, None
        self.num_moves += 1

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"bound": None}

    @property
    def dense(self) -> torch.Tensor:
        """B of every slot, transposed, (S, R, D), for kernels that know no other form; kept from the first call on."""
        if self._dense is None:
            self._dense = self._make_dense()
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

    def _make_dense(self) -> torch.Tensor:
        with torch.inference_mode(False):
            shape = (len(self.starts), self.layout.rank, self.layout.num_outputs)
            return torch.zeros(shape, dtype=self.layout.dtype, device=self.pool.device)

    def _unpack(self, slot: int) -> torch.Tensor:
        return unpack(self.layout, self.pool, self.starts[slot]).T.to(self.pool.device)

    def _put_in_pieces(self, slot: int, packed: Packed) -> None:
        # A window after the other wherever there is room, so that a pool in which only pieces are free need not grow.
        windows = (packed.starts >= 0).nonzero().flatten().tolist()
        begins = [*packed.starts[windows].tolist(), len(packed.blocks) // UNIT]
        self.starts[slot] = -1
        self._taken[slot] = []
        for window, (start, stop) in zip(windows, pairwise(begins), strict=True):
            place = self._extents.take(stop - start)
            if place is None:
                self._grow(max(stop - start, self._extents.size // GROWTH))
                place = self._extents.take(stop - start)
                assert place is not None
            self.pool[place * UNIT : (place + stop - start) * UNIT] = packed.blocks[start * UNIT : stop * UNIT]
            self.starts[slot, window] = place
            self._taken[slot].append((place, stop - start))

    def _grow(self, length: int) -> None:
        if length <= 0:
            return
        with torch.inference_mode(False):
            pool = torch.zeros((self._extents.size + length) * UNIT, dtype=torch.uint8, device=self.pool.device)
            pool[: len(self.pool)] = self.pool
        self._extents.grow(length)
        self.pool, self.bound = pool, None
        self.num_moves += 1
