"""The B of every resident adapter for one module, in one flat pool of bytes with the layout of `lori.kernels.layout`.

Shapes: D outputs, R rank, S slots, W windows.
"""

from bisect import bisect_left
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from lori.kernels.layout import UNIT, Layout, Packed, pack, unpack
from lori.native import MODULE
from lori.sparse import SparseB

if TYPE_CHECKING:
    import _lori_cpu


class Extents:
    """First-fit allocator over `size` units. Keeps the free extents in ascending order and joins adjacent ones."""

    def __init__(self, size: int = 0) -> None:
        self.size = 0
        self._free: list[tuple[int, int]] = []  # (start, length) of each free extent
        self.grow(size)

    @property
    def num_free(self) -> int:
        """Number of free units."""
        return sum(length for _, length in self._free)

    def allocate(self, length: int) -> int | None:
        """Allocate the first free `length` units in one piece and return their start; `None` if there are none."""
        for i, (start, num_free) in enumerate(self._free):
            if num_free >= length:
                self._free[i : i + 1] = [(start + length, num_free - length)] if num_free > length else []
                return start
        return None

    def free(self, start: int, length: int) -> None:
        """Free an allocated extent."""
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
            self.free(self.size - length, length)


GROWTH = 8
"""Divisor for growth: a full pool grows by an eighth of its size, or by the requested length if that is more."""


class Operands:
    """The packed B of all slots of one module.

    `pool` (bytes,) uint8 holds the windows of all slots. `starts` (S, W) int32 holds the start of each window, in units of 16
    bytes; -1 for an empty window. `basis_of` (S,) int32 is the index of each slot's basis in s (T, A, R). A slot has the same
    number in all modules. `put` and `clear` do not move other slots. Neither may run while a step reads the pool. Raises
    `ValueError` if no kernel supports the rank or the dtype.
    """

    def __init__(self, num_slots: int, rank: int, num_outputs: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.layout = Layout(num_outputs, rank, dtype)
        with torch.inference_mode(False):  # an inference tensor cannot be changed outside of inference mode
            self.pool = torch.zeros(0, dtype=torch.uint8, device=device)
            self.starts = torch.full((num_slots, self.layout.num_windows), -1, dtype=torch.int32, device=device)
            self.basis_of = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self.is_cpu = self.pool.is_cpu
        self.num_bases = 1
        """Lowest number of bases that s must have."""
        self.bound: _lori_cpu.Operands | None = None
        """Cache of the `cpu` kernel: its C++ view of the arrays. Dropped when the pool moves."""
        self.num_moves = 0
        """Number of times that the pool has moved. A CUDA graph captured before a move holds a stale address."""
        self._extents = Extents()
        self._slot_extents: dict[int, list[tuple[int, int]]] = {}  # (start, length) of each slot's extents
        self._dense: torch.Tensor | None = None
        if not MODULE and self.pool.device.type == "cpu":
            self._dense = self._make_dense()  # at start, since the first step needs it

    @classmethod
    def from_arrays(
        cls, layout: Layout, pool: torch.Tensor, starts: torch.Tensor, basis_of: torch.Tensor, num_bases: int = 1
    ) -> "Operands":
        """Return read-only operands over arrays that the caller owns."""
        operands = cls(0, layout.rank, layout.num_outputs, layout.dtype, pool.device)
        operands.pool, operands.starts, operands.basis_of, operands.num_bases = pool, starts, basis_of, num_bases
        operands._dense = None
        return operands

    def pack(self, b: SparseB, scale: float = 1.0) -> Packed:
        """Pack scale * B (D, r), r <= R, for `put`. Thread-safe, since it does not access the arrays."""
        assert b.shape[0] == self.layout.num_outputs
        assert b.shape[1] <= self.layout.rank
        return pack(self.layout, b, scale)

    def put(self, slot: int, packed: Packed, basis: int) -> None:
        """Make `packed` the B of `slot`, on the basis with index `basis` in s.

        Raises `ValueError` if there is no such slot or basis, or `packed` has another layout.
        """
        if packed.layout != self.layout or not 0 <= slot < len(self.starts) or basis < 0:
            arguments = f"{packed.layout} for slot {slot} of {len(self.starts)} on basis {basis}"
            raise ValueError(f"{arguments}; expected {self.layout}, a slot that is there and a basis from 0")
        length = len(packed.blocks) // UNIT
        start = self.allocate(slot, length)
        if start is None:
            self._put_in_pieces(slot, packed)
        else:
            self.pool[start * UNIT : (start + length) * UNIT] = packed.blocks
            self.starts[slot] = packed.starts + torch.where(packed.starts < 0, 0, start)
        self.basis_of[slot] = basis
        self.num_bases = max(self.num_bases, basis + 1)
        if self._dense is not None:
            self._dense[slot] = self._unpack(slot)

    def allocate(self, slot: int, length: int) -> int | None:
        """Allocate `length` units in one piece for `slot` and return their start. Frees the slot's former extents.

        The pool grows if it has fewer free units. Returns `None` if it has enough, but not in one piece. The caller must write
        the blocks, `starts` and `basis_of`.
        """
        self._free_slot(slot)
        start = self._extents.allocate(length) if length else 0
        if start is None and length > self._extents.num_free:
            self._grow(max(length, self._extents.size // GROWTH))
            start = self._extents.allocate(length)
        if start is not None and length:
            self._slot_extents[slot] = [(start, length)]
        return start

    @property
    def is_packed_on_cpu(self) -> bool:
        """Whether the arrays are in CPU memory and there is no dense copy of B."""
        return self.is_cpu and self._dense is None

    def addresses(self, slot: int) -> tuple[int, int, int, int]:
        """Return the pool's address, its size in units, and the addresses of the slot's rows in `starts` and `basis_of`.

        The addresses are valid until the pool moves.
        """
        starts = self.starts.data_ptr() + slot * self.layout.num_windows * 4
        return self.pool.data_ptr(), self._extents.size, starts, self.basis_of.data_ptr() + slot * 4

    def clear(self, slot: int) -> None:
        """Make the delta of `slot` zero and free its extents in the pool."""
        self._free_slot(slot)
        # NumPy avoids the overhead of torch's dispatcher, since an adapter has hundreds of modules.
        (self.starts.numpy() if self.is_cpu else self.starts)[slot] = -1
        if self._dense is not None:
            self._dense[slot] = 0

    def _free_slot(self, slot: int) -> None:
        # Frees the slot's extents. The caller updates `starts`, which still points to them.
        for start, length in self._slot_extents.pop(slot, ()):
            self._extents.free(start, length)

    def reserve(self, num_bytes: int) -> None:
        """Grow the pool to `num_bytes`, so that later puts up to this size do not move it."""
        self._grow(-(-num_bytes // UNIT) - self._extents.size)

    def adopt_pool(self, pool: torch.Tensor) -> None:
        """Use `pool` (bytes,) uint8, zeros that start at a multiple of 16 bytes, as the pool. The current pool must be empty."""
        assert not self._extents.size
        assert not len(pool) % UNIT
        self._extents.grow(len(pool) // UNIT)
        self.pool, self.bound = pool, None
        self.num_moves += 1

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"bound": None}

    @property
    def dense(self) -> torch.Tensor:
        """Dense B of every slot, transposed, (S, R, D), for kernels that need it. Made on first use, then kept up to date."""
        if self._dense is None:
            self._dense = self._make_dense()
            for slot in (self.starts >= 0).any(dim=1).nonzero().flatten().tolist():
                self._dense[slot] = self._unpack(slot)
        return self._dense

    def num_slot_bytes(self, slot: int) -> int:
        """Return the bytes of a slot's blocks, 0 for an empty slot."""
        return UNIT * sum(length for _, length in self._slot_extents.get(slot, ()))

    @property
    def num_free_bytes(self) -> int:
        """Free bytes of the pool."""
        return UNIT * self._extents.num_free

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays, with the pool's free bytes."""
        tensors = (self.pool, self.starts, self.basis_of, *([] if self._dense is None else [self._dense]))
        return sum(tensor.nbytes for tensor in tensors)

    def _make_dense(self) -> torch.Tensor:
        with torch.inference_mode(False):
            shape = (len(self.starts), self.layout.rank, self.layout.num_outputs)
            return torch.zeros(shape, dtype=self.layout.dtype, device=self.pool.device)

    def _unpack(self, slot: int) -> torch.Tensor:
        return unpack(self.layout, self.pool, self.starts[slot]).T.to(self.pool.device)

    def _put_in_pieces(self, slot: int, packed: Packed) -> None:
        # Allocates each window separately, so that a fragmented pool need not grow.
        windows = (packed.starts >= 0).nonzero().flatten().tolist()
        begins = [*packed.starts[windows].tolist(), len(packed.blocks) // UNIT]
        self.starts[slot] = -1
        self._slot_extents[slot] = []
        for window, (start, stop) in zip(windows, pairwise(begins), strict=True):
            place = self._extents.allocate(stop - start)
            if place is None:
                self._grow(max(stop - start, self._extents.size // GROWTH))
                place = self._extents.allocate(stop - start)
                assert place is not None
            self.pool[place * UNIT : (place + stop - start) * UNIT] = packed.blocks[start * UNIT : stop * UNIT]
            self.starts[slot, window] = place
            self._slot_extents[slot].append((place, stop - start))

    def _grow(self, length: int) -> None:
        if length <= 0:
            return
        with torch.inference_mode(False):
            pool = torch.zeros((self._extents.size + length) * UNIT, dtype=torch.uint8, device=self.pool.device)
            pool[: len(self.pool)] = self.pool
        self._extents.grow(length)
        self.pool, self.bound = pool, None
        self.num_moves += 1
