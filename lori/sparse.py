"""B of one module with only its kept entries: where they are, and their values.

Shapes: D outputs, R rank, K kept entries in row-major order.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class SparseB:
    """A sparse B of `shape` (D, R): `indices` (K,) int32 are positions in row-major order, ascending, of `values` (K,)."""

    shape: tuple[int, int]
    indices: torch.Tensor
    values: torch.Tensor

    def __post_init__(self) -> None:
        assert self.indices.dtype == torch.int32
        assert self.indices.dim() == 1
        assert self.values.shape == self.indices.shape

    @classmethod
    def from_dense(cls, dense: torch.Tensor, mask: torch.Tensor) -> "SparseB":
        """Keeps the entries of `dense` (D, R) where `mask` (D, R) is true."""
        assert mask.dtype == torch.bool
        indices = mask.cpu().flatten().nonzero().squeeze(1)
        return cls((dense.shape[0], dense.shape[1]), indices.int(), dense.detach().cpu().flatten()[indices])

    @property
    def mask(self) -> torch.Tensor:
        """Which entries are kept, (D, R) bool."""
        out = torch.zeros(self.num_entries, dtype=torch.bool)
        out[self.indices.long()] = True
        return out.view(self.shape)

    @property
    def rows(self) -> torch.Tensor:
        """The output that each kept entry adds to, (K,) int64."""
        return self.indices.long() // self.shape[1]

    @property
    def num_entries(self) -> int:
        """D R."""
        return self.shape[0] * self.shape[1]

    @property
    def density(self) -> float:
        """K / (D R)."""
        return self.values.numel() / self.num_entries

    @property
    def num_bytes(self) -> int:
        """What it holds in memory, in bytes."""
        return self.indices.nbytes + self.values.nbytes

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Returns B as (D, R) of `dtype`, zero where nothing is kept."""
        out = torch.zeros(self.num_entries, dtype=dtype)
        out[self.indices.long()] = self.values.to(dtype)
        return out.view(self.shape)
