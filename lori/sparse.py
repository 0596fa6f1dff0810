"""B of one module with only its kept entries: a mask and the packed values.

Shapes: D outputs, R rank, K kept entries in row-major order.
"""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class SparseB:
    """A sparse B: `mask` (D, R) bool and `values` (K,), K the number of true entries, in row-major order."""

    mask: torch.Tensor
    values: torch.Tensor

    def __post_init__(self) -> None:
        assert self.mask.dtype == torch.bool
        assert self.mask.dim() == 2
        assert self.values.shape == (int(self.mask.sum()),)

    @classmethod
    def from_dense(cls, dense: torch.Tensor, mask: torch.Tensor) -> "SparseB":
        """Keeps the entries of `dense` (D, R) where `mask` (D, R) is true."""
        return cls(mask.cpu(), dense.detach().cpu()[mask.cpu()])

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Returns B as (D, R) of `dtype`, zero where the mask is false."""
        out = torch.zeros(self.mask.shape, dtype=dtype)
        out[self.mask] = self.values.to(dtype)
        return out


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """Packs a bool mask (D, R) into (ceil(D R / 8),) uint8, row-major, lowest bit first."""
    return torch.from_numpy(np.packbits(mask.numpy().reshape(-1), bitorder="little"))


def unpack_mask(bitmap: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Unpacks what `pack_mask` packed into a bool mask of `shape`; bits past the last entry are ignored."""
    bits = np.unpackbits(bitmap.numpy(), count=shape[0] * shape[1], bitorder="little")
    return torch.from_numpy(bits.astype(np.bool_)).view(shape)
