"""The sparse B of one module: positions and values of its nonzero entries, and the storage types of values.

Values are stored as bf16, fp16, fp32 or int8; int8 has one bf16 scale per output row. Shapes: D outputs, R rank, K nonzero
entries in row-major order.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True, slots=True)
class SparseB:
    """A sparse B of `shape` (D, R). `indices` (K,) int32 are the row-major positions, ascending, of `values` (K,)."""

    shape: tuple[int, int]
    indices: torch.Tensor
    values: torch.Tensor

    def __post_init__(self) -> None:
        assert self.indices.dtype == torch.int32
        assert self.indices.dim() == 1
        assert self.values.shape == self.indices.shape

    @classmethod
    def from_dense(cls, dense: torch.Tensor, mask: torch.Tensor) -> "SparseB":
        """Return the entries of `dense` (D, R) where the bool `mask` (D, R) is true, on the CPU."""
        assert mask.dtype == torch.bool
        indices = mask.cpu().flatten().nonzero().squeeze(1)
        return cls((dense.shape[0], dense.shape[1]), indices.int(), dense.detach().cpu().flatten()[indices])

    @property
    def mask(self) -> torch.Tensor:
        """The positions of the nonzero entries as a mask, (D, R) bool."""
        out = torch.zeros(self.num_entries, dtype=torch.bool)
        out[self.indices.long()] = True
        return out.view(self.shape)

    @property
    def rows(self) -> torch.Tensor:
        """The row (output) of each nonzero entry, (K,) int64."""
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
        """Bytes that indices and values take in memory."""
        return self.indices.nbytes + self.values.nbytes

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return B as a dense (D, R) of `dtype`."""
        out = torch.zeros(self.num_entries, dtype=dtype)
        out[self.indices.long()] = self.values.to(dtype)
        return out.view(self.shape)


ValueType = Literal["bfloat16", "float16", "float32", "int8"]
VALUE_TYPES: tuple[ValueType, ...] = get_args(ValueType)
INT8_MAX = 127
SMALLEST_NORMAL = 0x80
"""Bits of the smallest positive normal bf16. The bits of larger numbers are larger integers."""
Rows = npt.NDArray[np.integer]
"""The row (output) of each nonzero entry, (K,) ascending."""


def stored_dtype(value_type: ValueType) -> torch.dtype:
    """Return the dtype of the values on disk."""
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "int8": torch.int8}[value_type]


def rounded(b: SparseB, value_type: ValueType) -> SparseB:
    """Return `b` with its values as a reader will load them after storage as `value_type`; int8 loads as fp32.

    Rounding twice equals rounding once. Values that the type cannot hold become infinite; with int8, rows too small for a bf16
    scale become zero.
    """
    if value_type != "int8":
        return SparseB(b.shape, b.indices, b.values.to(stored_dtype(value_type)))
    quantized, scales = quantize(b)
    return SparseB(b.shape, b.indices, dequantize(quantized, scales, b.rows.numpy()))


def quantize(b: SparseB) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 values (K,) and bf16 scales (D,). Each row's largest magnitude is 127 times its scale.

    A scale that would be subnormal in bf16 becomes zero, and so does its row.
    """
    values, rows = b.values.float(), b.rows
    peaks = torch.zeros(b.shape[0]).scatter_reduce(0, rows, values.abs(), "amax")
    scales = (peaks / INT8_MAX).bfloat16()
    scales[scales < torch.finfo(torch.bfloat16).smallest_normal] = 0.0
    steps = scales.float()[rows]
    quantized = torch.where(steps > 0, values / steps, 0.0).round().clamp(-INT8_MAX, INT8_MAX)
    # int8 cannot hold infinities and NaN, so they become 0. The caller must refuse them.
    return quantized.nan_to_num(0.0).to(torch.int8), scales


def is_canonical(quantized: torch.Tensor, scales: torch.Tensor, rows: Rows) -> bool:
    """Return whether values (K,) int8 and scales (D,) are a pair that `quantize` returns. Other pairs could mean the same B.

    In a canonical pair, a row with a nonzero value has a scale above 0 and a value of 127 or -127. Other rows have the scale 0.
    """
    values, bits = quantized.numpy(), scales.view(torch.int16).numpy()
    has_value, has_peak = np.zeros((2, len(scales)), np.bool_)
    has_value[rows[values != 0]] = True
    has_peak[rows[np.abs(values) == INT8_MAX]] = True
    has_scale = bits >= SMALLEST_NORMAL
    is_scaled = (has_value == has_peak).all() and (has_peak == has_scale).all() and (has_scale == (bits != 0)).all()
    return bool(is_scaled and (values > -128).all())


def dequantize(quantized: torch.Tensor, scales: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Return values (K,) fp32: exactly `quantized` (K,) int8 times the scale of its row, from `scales` (D,) by `rows` (K,)."""
    return quantized.float().mul_(torch.from_numpy(scales.float().numpy()[rows]))


def rounding_error(modules: Iterable[SparseB], value_type: ValueType) -> float:
    """Return |rounded - B| / |B| in the Frobenius norm over all modules together."""
    error = norm = 0.0
    for b in modules:
        exact = b.values.double()
        error += float((rounded(b, value_type).values.double() - exact).square().sum())
        norm += float(exact.square().sum())
    return math.sqrt(error / norm) if norm else 0.0
