"""Golomb-Rice code (Rice 1979; Golomb 1966) of a mask on disk: codes the gaps between nonzero entries.

At a density of 10% the code takes 0.476 bits an entry, 1.5% above the entropy of 0.469; a bitmap takes 1. With k = 0, which dense
masks get, the code equals the bitmap up to the last nonzero entry. Decoding costs O(K) NumPy operations, without a Python loop
over entries.

A gap is the number of zero entries before a nonzero entry. First come the quotients of all gaps by 2^k in unary (as many zeros,
then a one), lowest bit first. Then come the k bits of the remainders, as k planes of K bits, lowest bit first. Every part begins
at a whole byte. Shapes: K nonzero entries (nnz) of the mask.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Code = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int32]
MAX_ENTRIES = 2**26
"""Maximum number of entries of one mask; a 405B model at rank 512 has 28 million at most."""


def parameter(num_entries: int, nnz: int) -> int:
    """Return k, the smallest with 2^k >= 0.4812 (1 / density - 1 / 2): the best for a random mask (Kiely 2004)."""
    k = 0
    while nnz and (20_000 * nnz) << k < 4_812 * (2 * num_entries - nnz):
        k += 1
    return k


def encode(indices: Indices, num_entries: int) -> Code:
    """Return the code (uint8) of a mask over `num_entries` whose nonzero entries are `indices` (K,), ascending."""
    k = parameter(num_entries, len(indices))
    gaps = np.diff(indices, prepend=np.int32(-1)) - 1
    ends = np.cumsum((gaps >> k) + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1 if len(ends) else 0, np.bool_)
    unary[ends] = True
    return np.concatenate([_pack(unary), *(_pack((gaps >> bit) & 1) for bit in range(k))])


def decode(code: Code, num_entries: int, nnz: int) -> Indices:
    """Return the indices (K,) int32 that were passed to `encode`.

    Raises `ValueError` if `encode` does not return `code` for any mask over `num_entries` with `nnz` nonzero entries. No computed
    number exceeds three times `num_entries`, which must be at most `MAX_ENTRIES`.
    """
    k, num_bytes = parameter(num_entries, nnz), (nnz + 7) // 8
    cut = len(code) - k * num_bytes
    if cut > ((num_entries >> k) + nnz + 7) // 8:  # checked before the unpacking, which takes eight times the memory
        raise ValueError(f"the mask's unary part has {cut} bytes, more than any mask of {num_entries} entries")
    ends = np.flatnonzero(np.unpackbits(code[: max(cut, 0)], bitorder="little").view(np.bool_)).astype(np.int32)
    if cut < 0 or len(ends) != nnz:
        raise ValueError(f"the mask's code holds {len(ends)} entries, expected {nnz}")
    if nnz and (num_zeros := int(ends[-1]) + 1 - nnz) > num_entries >> k:  # checked before a shift that could overflow
        raise ValueError(f"the mask's gaps make at least {num_zeros << k} entries, expected at most {num_entries}")
    order = np.arange(nnz, dtype=np.int32)
    indices = ((ends - order) << k) + order
    if k:
        planes = np.unpackbits(code[cut:].reshape(k, num_bytes), axis=1, bitorder="little")
        if planes[:, nnz:].any():
            raise ValueError("the mask has bits past its last entry")
        remainders: npt.NDArray[Any] = np.zeros(nnz, np.uint8 if k <= 8 else np.int32)
        for bit in range(k):
            remainders |= planes[bit, :nnz].astype(remainders.dtype) << bit
        indices += np.cumsum(remainders, dtype=np.int32)
    if nnz and int(indices[-1]) >= num_entries:
        raise ValueError(f"the mask keeps entry {int(indices[-1])} of {num_entries}")
    if cut != (int(ends[-1]) // 8 + 1 if nnz else 0):
        raise ValueError(f"the mask's unary part has {cut} bytes, expected {int(ends[-1]) // 8 + 1 if nnz else 0}")
    return indices


def _pack(bits: npt.NDArray[np.bool_] | npt.NDArray[np.int32]) -> Code:
    return np.packbits(bits, bitorder="little")
