"""The run-time layout of B: sliced ELLPACK with rows sorted in windows (SELL-C-sigma, Kreutzer et al. 2014), C = 16, sigma = 256.

The D rows of B are cut in windows of 256. In a window the rows are ordered by their number of entries, most first, and 16
neighbours in that order are a slice. A slice has as many steps as its first row has entries; step k holds the k-th entry of each
of its rows, one a lane, and zeros for rows with fewer. A window is one block of bytes, read from its first to its last:

    ends     (16,) uint16       end of each slice, in steps of the window
    values   (16,)              values of a step, in the model's bf16 or fp32; bf16 steps come in pairs, interleaved lane by lane
    columns  (16,)              columns of the same step or pair: uint8 up to rank 256, uint16 beyond
    …                           the other steps
    places   (rows,) uint8      place of each row, rows rounded up to a multiple of 16: 32 (slice // 2) + 2 lane + slice % 2

So a lane of values is 4 bytes wide, except in the last step of a slice with an odd number of bf16 steps. Blocks start at
multiples of 16 bytes. An empty window has no block.

Values and columns in two separate arrays took 3 times as long outside the cache, since the prefetcher follows one stream.
Sorting within 256 rows was measured against other windows, on adapters at r = 32 and density 0.1 (bytes an entry, of which 3
are value and column): not sorted 8.4, 64 rows 5.1, 128 rows 4.4, 256 rows 3.9, 512 rows (two bytes a place) 4.0. Time is least at
128, and at 256 within a tenth of that. Shapes: D outputs, R rank, K nonzero entries, W windows.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lori.native import MODULE
from lori.sparse import SparseB

Ints = npt.NDArray[np.int64]

LANES, SLICES, UNIT = 16, 16, 16
WINDOW = LANES * SLICES
HEADER = 2 * SLICES
MAX_RANK = 2048


@dataclass(frozen=True, slots=True)
class Layout:
    """Layout of the blocks of one module: B is (D, R), with values of `dtype`.

    Raises `ValueError` if the kernels do not support the rank or the dtype.
    """

    num_outputs: int
    rank: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MAX_RANK:
            raise ValueError(f"rank {self.rank}, expected 1 to {MAX_RANK}")
        if self.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"dtype {self.dtype}, expected torch.bfloat16 or torch.float32")

    @property
    def dtype_name(self) -> str:
        """The dtype's name, such as "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def num_windows(self) -> int:
        """Number of windows, W."""
        return -(-self.num_outputs // WINDOW)

    @property
    def column_dtype(self) -> type[np.unsignedinteger]:
        """NumPy dtype of a column."""
        return np.uint8 if self.rank <= 256 else np.uint16

    @property
    def value_dtype(self) -> type[np.unsignedinteger]:
        """NumPy dtype of a value's bits."""
        return np.uint16 if self.dtype is torch.bfloat16 else np.uint32

    @property
    def step_bytes(self) -> int:
        """Bytes of a step: values and columns."""
        return LANES * (self.dtype.itemsize + np.dtype(self.column_dtype).itemsize)

    def num_slices(self, window: int) -> int:
        """Return the number of slices of a window: 16, or fewer in the last window."""
        return min(SLICES, -(-(self.num_outputs - window * WINDOW) // LANES))


@dataclass(frozen=True, slots=True)
class Packed:
    """One adapter's packed B of one module.

    `blocks` (bytes,) uint8 holds the windows one after the other. `starts` (W,) int32 holds the start of each window in `blocks`,
    in units of 16 bytes; -1 for an empty window.
    """

    layout: Layout
    blocks: torch.Tensor
    starts: torch.Tensor


def place_of(position: Ints) -> Ints:
    """Return the places of rows from their positions in the window's order."""
    return 32 * (position // 32) + 2 * (position % LANES) + position // LANES % 2


def pack(layout: Layout, b: SparseB, scale: float = 1.0) -> Packed:
    """Pack scale * B, of rank R at most."""
    if not MODULE:
        return pack_in_numpy(layout, b, scale)
    num_outputs, rank = b.shape
    values = b.values.float() * scale
    column_bytes = layout.column_dtype().itemsize
    blocks, starts = MODULE.pack(b.indices.numpy(), values.numpy(), num_outputs, rank, layout.dtype_name, column_bytes)
    return Packed(layout, torch.from_numpy(blocks), torch.from_numpy(starts))


def pack_in_numpy(layout: Layout, b: SparseB, scale: float = 1.0) -> Packed:
    """Return the same bytes as `pack`, slower."""
    indices = b.indices.numpy().astype(np.int64)
    rows, columns = indices // b.shape[1], indices % b.shape[1]
    values = (b.values.float() * scale).to(layout.dtype)
    bits = values.view(torch.uint8).numpy().view(layout.value_dtype)
    blocks = []
    for window in range(layout.num_windows):
        inside = slice(*np.searchsorted(rows, (window * WINDOW, (window + 1) * WINDOW)))
        blocks.append(_pack_window(layout, window, rows[inside] - window * WINDOW, columns[inside], bits[inside]))
    sizes = np.array([len(block) for block in blocks]) // UNIT
    starts = np.where(sizes > 0, sizes.cumsum() - sizes, -1).astype(np.int32)
    data = np.frombuffer(b"".join(blocks), dtype=np.uint8).copy()
    return Packed(layout, torch.from_numpy(data), torch.from_numpy(starts))


def unpack(layout: Layout, pool: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Return B as (D, R) fp32 from its windows in `pool`."""
    data = pool.cpu().numpy()
    dense = np.zeros((layout.num_windows * WINDOW, layout.rank), dtype=np.float32)
    for window, start in enumerate(starts.tolist()):
        if start >= 0:
            rows, columns, values = _unpack_window(layout, window, data[start * UNIT :])
            np.add.at(dense, (window * WINDOW + rows, columns), values)  # padding adds zeros
    return torch.from_numpy(dense[: layout.num_outputs])


def _pack_window(layout: Layout, window: int, rows: Ints, columns: Ints, bits: npt.NDArray[np.unsignedinteger]) -> bytes:
    if not len(rows):
        return b""
    lengths = np.bincount(rows, minlength=LANES * layout.num_slices(window))
    order = np.argsort(-lengths, kind="stable")
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    ends = np.zeros(SLICES, dtype=np.int64)
    ends[: layout.num_slices(window)] = lengths[order][::LANES]  # steps of each slice, whose first row is its longest
    ends = ends.cumsum()
    entry = np.arange(len(rows)) - (lengths.cumsum() - lengths)[rows]
    steps = np.zeros(layout.step_bytes * ends[-1], dtype=np.uint8)
    values_at, columns_at = _addresses(layout, ends, position[rows], entry)
    steps.view(layout.value_dtype)[values_at] = bits
    steps.view(layout.column_dtype)[columns_at] = columns
    places = place_of(position).astype(np.uint8)
    places[layout.num_outputs - window * WINDOW :] = 0
    block = b"".join(part.tobytes() for part in (ends.astype(np.uint16), steps, places))
    return block.ljust(-(-len(block) // UNIT) * UNIT, b"\0")


def _unpack_window(layout: Layout, window: int, block: npt.NDArray[np.uint8]) -> tuple[Ints, Ints, npt.NDArray[np.float32]]:
    """Return the row in the window, the column and the value of each entry, padding included."""
    ends = block[:HEADER].view(np.uint16).astype(np.int64)
    num_rows = LANES * layout.num_slices(window)
    steps, places = np.split(block[HEADER:][: layout.step_bytes * ends[-1] + num_rows], [layout.step_bytes * ends[-1]])
    position = np.repeat(np.arange(num_rows), np.diff(ends, prepend=0)[np.arange(num_rows) // LANES])
    first = np.flatnonzero(np.diff(position, prepend=-1))
    entry = np.arange(len(position)) - np.repeat(first, np.diff(first, append=len(position)))
    values_at, columns_at = _addresses(layout, ends, position, entry)
    values = torch.from_numpy(steps.view(layout.value_dtype)[values_at].view(np.uint8)).view(layout.dtype).float().numpy()
    columns = steps.view(layout.column_dtype)[columns_at].astype(np.int64)
    row_at = np.zeros(WINDOW, dtype=np.int64)
    num_real_rows = min(num_rows, layout.num_outputs - window * WINDOW)
    row_at[places[:num_real_rows]] = np.arange(num_real_rows)
    return row_at[place_of(position)], columns, values


def _addresses(layout: Layout, ends: Ints, position: Ints, entry: Ints) -> tuple[Ints, Ints]:
    """Return the offsets among the steps of the value and the column of entry `entry` of the row at `position`.

    Offsets count in units of a value's and of a column's size.
    """
    begin = (ends - np.diff(ends, prepend=0))[position // LANES]
    steps, per_lane = ends[position // LANES] - begin, 4 // layout.dtype.itemsize
    together = np.where(entry < steps // per_lane * per_lane, per_lane, 1)
    chunk = layout.step_bytes * (begin + entry // together * together)
    within = together * (position % LANES) + entry % together
    column_bytes = np.dtype(layout.column_dtype).itemsize
    columns_at = (chunk + together * LANES * layout.dtype.itemsize) // column_bytes + within
    return chunk // layout.dtype.itemsize + within, columns_at
