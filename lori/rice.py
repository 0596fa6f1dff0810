"""A mask on disk: the gaps between kept entries in a Golomb-Rice code (Rice 1979; Golomb 1966).

At 10% kept it takes 0.476 bits an entry, 1.5% above the entropy of 0.469, where a bitmap takes 1; with the parameter 0, which
dense masks get, it *is* the bitmap up to its last one. Decoding touches kept entries alone: no loop in Python, no bit a mask.

A gap is the number of entries left out before a kept one. Its quotient by 2^k stands in unary (as many zeros, then a one), lowest
bit first; then come the k bits of the remainders, one plane of K bits each, the lowest first. Every part begins at a whole byte.
Shapes: K kept entries.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Code = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int32]
MAX_ENTRIES = 2**26
"""Of one mask; a 405B model at rank 512 has 28 million at most."""


def parameter(num_entries: int, num_kept: int) -> int:
    """Return k, the least with 2^k >= 0.4812 (1 / density - 1 / 2): the best for a random mask (Kiely 2004)."""
    k = 0
    while num_kept and (20_000 * num_kept) << k < 4_812 * (2 * num_entries - num_kept):
        k += 1
    return k


def encode(indices: Indices, num_entries: int) -> Code:
    """Return the code (uint8) of a mask over `num_entries` that keeps `indices` (K,), ascending."""
    k = parameter(num_entries, len(indices))
    gaps = np.diff(indices, prepend=np.int32(-1)) - 1
    ends = np.cumsum((gaps >> k) + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1 if len(ends) else 0, np.bool_)
    unary[ends] = True
    return np.concatenate([_pack(unary), *(_pack((gaps >> bit) & 1) for bit in range(k))])


def decode(code: Code, num_entries: int, num_kept: int) -> Indices:
    """Return the indices (K,) int32 that `encode` was given.

    Raises `ValueError` where `code` is not what `encode` gives for a mask over `num_entries` that keeps `num_kept`. Nothing it
    computes exceeds three times `num_entries`, which must be at most `MAX_ENTRIES`.
    """
    k, num_bytes = parameter(num_entries, num_kept), (num_kept + 7) // 8
    cut = len(code) - k * num_bytes
    if cut > ((num_entries >> k) + num_kept + 7) // 8:  # before it takes eight times as much
        raise ValueError(f"the mask's unary part has {cut} bytes, more than any mask of {num_entries} entries")
    ends = np.flatnonzero(np.unpackbits(code[: max(cut, 0)], bitorder="little").view(np.bool_)).astype(np.int32)
    if cut < 0 or len(ends) != num_kept:
        raise ValueError(f"the mask's code holds {len(ends)} entries, expected {num_kept}")
    if num_kept and (num_zeros := int(ends[-1]) + 1 - num_kept) > num_entries >> k:  # before a shift that could overflow
        raise ValueError(f"the mask's gaps make at least {num_zeros << k} entries, expected at most {num_entries}")
    order = np.arange(num_kept, dtype=np.int32)
    indices = ((ends - order) << k) + order
    if k:
        planes = np.unpackbits(code[cut:].reshape(k, num_bytes), axis=1, bitorder="little")
        if planes[:, num_kept:].any():
            raise ValueError("the mask has bits past its last entry")
        remainders: npt.NDArray[Any] = np.zeros(num_kept, np.uint8 if k <= 8 else np.int32)
        for bit in range(k):
            remainders |= planes[bit, :num_kept].astype(remainders.dtype) << bit
        indices += np.cumsum(remainders, dtype=np.int32)
    if num_kept and int(indices[-1]) >= num_entries:
        raise ValueError(f"the mask keeps entry {int(indices[-1])} of {num_entries}")
    if cut != (int(ends[-1]) // 8 + 1 if num_kept else 0):
        raise ValueError(f"the mask's unary part has {cut} bytes, expected {int(ends[-1]) // 8 + 1 if num_kept else 0}")
    return indices


def _pack(bits: npt.NDArray[np.bool_] | npt.NDArray[np.int32]) -> Code:
    return np.packbits(bits, bitorder="little")
