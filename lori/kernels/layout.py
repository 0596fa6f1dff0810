"""The run-time layout of B: sliced ELLPACK with rows sorted in windows (SELL-C-sigma, Kreutzer et al. 2014), C = 16, sigma = 256.

The D rows of B are cut in windows of 256. In a window the rows are ordered by how many entries they have, most first, and 16
neighbours in that order are a slice. A slice has as many steps as its first row has entries; step k holds the k-th entry of each
of its rows, one a lane, and zeros where a row has fewer. A window is one block of bytes:

    ends     (16,) uint16       where each of its slices ends, in steps of the window
    places   (rows,) uint8      for each row, up to a multiple of 16, its place: 32 (slice // 2) + 2 lane + slice % 2
    values   (steps, 16)        bf16 or fp32, as the model's
    columns  (steps, 16)        uint8 up to rank 256, uint16 beyond

Each lane is 4 bytes of values wide: of a slice's bf16 steps two and two lie together, lane by lane, and so do their columns; a
last odd step lies as fp32's do. Blocks start at multiples of 16 bytes. An empty window has no block.

Sorting within 256 rows was measured against other windows, on adapters at r = 32 that keep a tenth (bytes an entry, of which 3
are value and column): not sorted 8.4, 64 rows 5.1, 128 rows 4.4, 256 rows 3.9, 512 rows (two bytes a place) 4.0. Time is least at
128, and at 256 within a tenth of that. Shapes: D outputs, R rank, K kept entries, W windows.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lori.sparse import SparseB

Ints = npt.NDArray[np.int64]

LANES, SLICES, UNIT = 16, 16, 16
WINDOW = LANES * SLICES
HEADER = 2 * SLICES
MAX_RANK = 2048


@dataclass(frozen=True, slots=True)
class Packed:
    """One adapter's B of one module: `blocks` (bytes,) uint8 are its windows one after the other, `starts` (W,) int32 where each
    begins, in units of 16 bytes; -1 where it is empty."""

    blocks: torch.Tensor
    starts: torch.Tensor


@dataclass(frozen=True, slots=True)
class Layout:
    """What the blocks of one module look like: B is (D, R), with values of `dtype`.

    Raises `ValueError` where the kernels know no such rank or dtype.
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
        """Such as "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def num_windows(self) -> int:
        """W."""
        return -(-self.num_outputs // WINDOW)

    @property
    def column_dtype(self) -> type[np.unsignedinteger]:
        """The type of a column."""
        return np.uint8 if self.rank <= 256 else np.uint16

    @property
    def value_dtype(self) -> type[np.unsignedinteger]:
        """The type of a value's bits."""
        return np.uint16 if self.dtype is torch.bfloat16 else np.uint32

    @property
    def entries_per_lane(self) -> int:
        """How many entries of a row lie together."""
        return 4 // self.dtype.itemsize

    def num_slices(self, window: int) -> int:
        """Slices of a window: 16, or fewer in the last."""
        return min(SLICES, -(-(self.num_outputs - window * WINDOW) // LANES))


def place_of(position: Ints) -> Ints:
    """Returns the place of the rows that come at a position in their window's order."""
    return 32 * (position // 32) + 2 * (position % LANES) + position // LANES % 2


def pack(layout: Layout, b: SparseB, scale: float = 1.0) -> Packed:
    """Packs scale * B, of rank R at most. `lori.kernels.cpu.pack` gives the same bytes, faster."""
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
    return Packed(torch.from_numpy(data), torch.from_numpy(starts))


def unpack(layout: Layout, pool: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Returns B as (D, R) fp32 from its windows in `pool`."""
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
    ends[: layout.num_slices(window)] = lengths[order][::LANES]  # the steps of each slice: its first row is its longest
    ends = ends.cumsum()
    entry = np.arange(len(rows)) - (lengths.cumsum() - lengths)[rows]
    at = _address(layout, ends, position[rows], entry)
    values = np.zeros(LANES * ends[-1], dtype=layout.value_dtype)
    values[at] = bits
    padded = np.zeros(len(values), dtype=layout.column_dtype)
    padded[at] = columns
    places = place_of(position).astype(np.uint8)
    places[layout.num_outputs - window * WINDOW :] = 0
    block = b"".join(part.tobytes() for part in (ends.astype(np.uint16), places, values, padded))
    return block.ljust(-(-len(block) // UNIT) * UNIT, b"\0")


def _unpack_window(layout: Layout, window: int, block: npt.NDArray[np.uint8]) -> tuple[Ints, Ints, npt.NDArray[np.float32]]:
    # The row in the window, the column and the value of each entry, padding included.
    ends = block[:HEADER].view(np.uint16).astype(np.int64)
    num_rows, num_entries = LANES * layout.num_slices(window), LANES * ends[-1]
    places, values_at = block[HEADER : HEADER + num_rows], HEADER + num_rows
    columns_at = values_at + num_entries * layout.dtype.itemsize
    values = torch.from_numpy(block[values_at:columns_at].copy()).view(layout.dtype).float().numpy()
    columns = block[columns_at:][: num_entries * np.dtype(layout.column_dtype).itemsize].view(layout.column_dtype)
    position = np.repeat(np.arange(num_rows), np.diff(ends, prepend=0)[np.arange(num_rows) // LANES])
    first = np.flatnonzero(np.diff(position, prepend=-1))
    entry = np.arange(len(position)) - np.repeat(first, np.diff(first, append=len(position)))
    at = _address(layout, ends, position, entry)
    row_at = np.zeros(WINDOW, dtype=np.int64)
    real = min(num_rows, layout.num_outputs - window * WINDOW)
    row_at[places[:real]] = np.arange(real)
    return row_at[place_of(position)], columns[at].astype(np.int64), values[at]


def _address(layout: Layout, ends: Ints, position: Ints, entry: Ints) -> Ints:
    # Where the k-th entry of the row at a position lies among the values and the columns of its window.
    slices, lane = position // LANES, position % LANES
    begin = (ends - np.diff(ends, prepend=0))[slices]
    together = layout.entries_per_lane
    paired = (ends[slices] - begin) // together * together
    step, place = entry - entry % together, together * lane + entry % together
    return LANES * begin + np.where(entry < paired, LANES * step + place, LANES * entry + lane)
