"""Near duplicates among very many adapters: count sketches find the candidates, the exact cosine confirms them.

The sketch is that of Charikar, Chen and Farach-Colton (2002): every coordinate of a vector is added, with a random sign, to a
random bucket out of W. Inner products of sketches estimate those of the vectors, with a relative error of about 1/sqrt(W). The
vector is the delta in an orthonormal frame of A's rows: (alpha/r) B Lᵀ with Aᵀ = Q L. On one A its inner products equal those of
the deltas. Shapes: n adapters, W buckets, D outputs, N inputs, R rank of a module.
"""

import functools
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from lori.adapter import Adapter
from lori.basis import Basis
from lori.compare.pairs import similarity_matrix

NUM_BUCKETS = 4096
MARGIN = 4.0 / math.sqrt(NUM_BUCKETS)
"""Tolerance of the candidate search: the sketches' cosine may be this far below the threshold. Four times the error for unrelated
deltas."""
ROUNDING = 1e-12
"""Tolerance of the exact cosine: that of a copy is 1 up to this rounding error."""
BLOCK = 512
"""Number of sketches that are multiplied with all others in one product."""
GROUP = 16
"""Number of candidates in memory while they are compared with one adapter."""
NUM_FRAMES = 1024
"""Number of frames in the cache: enough for all modules on a few bases."""


@dataclass(frozen=True, slots=True)
class Frame:
    """An orthonormal frame of the rows of one module's A."""

    key: int
    """Identifies module and A: 64 bits of a digest of the module's name and A's first row, which is the same for every rank."""
    factor: torch.Tensor
    """Lᵀ (R, min(R, N)) fp64: A's rows in the frame. The factor of a smaller rank is its first rows."""


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Two adapters whose deltas have almost the same direction. `cosine` is exact. One delta may be a multiple of the other."""

    a: str
    b: str
    cosine: float


def near_duplicates(entries: Mapping[str, Callable[[], Adapter]], threshold: float = 0.95) -> list[Duplicate]:
    """Return the pairs of `entries` with the same base model whose deltas' cosine is at least `threshold`, in entry order.

    Each entry is loaded once for its sketch, and again for each candidate pair; few adapters are in memory at a time. A pair is
    missed if its sketches err by more than `MARGIN`, or if its adapters share no A. An explicit copy of a drawn A counts as that
    A. The time grows with the number of duplicates. Raises `ValueError` unless 0 < threshold <= 1, and whatever loading raises.
    """
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"threshold is {threshold}, expected 0 < threshold <= 1")
    names = list(entries)
    partners = _candidates(*_sketches(entries), threshold - MARGIN)
    pairs = []
    for i in tqdm(sorted(partners), desc="comparing", unit="adapter", disable=None):
        adapter = entries[names[i]]()
        for group in _groups([names[j] for j in partners[i]]):
            cosines = similarity_matrix([adapter, *(entries[name]() for name in group)])[0, 1:]
            pairs += [Duplicate(names[i], b, float(c)) for b, c in zip(group, cosines, strict=True) if c >= threshold - ROUNDING]
    return pairs


def frame_of(basis: Basis, module: str, rank: int, num_inputs: int) -> Frame:
    """Return the frame of the first `rank` rows of A of `module`, (R, N)."""
    a = basis.draw(module, rank, num_inputs)
    digest = hashlib.sha256(f"{module}|".encode() + a[0].numpy().astype("<f4", copy=False).tobytes()).digest()
    return Frame(int.from_bytes(digest[:8], "little"), torch.linalg.qr(a.double().T, mode="r").R.T)


def sketch(adapter: Adapter, frame: Callable[[Basis, str, int, int], Frame] = frame_of) -> NDArray[np.float64]:
    """Return the count sketch (W,) fp64 of an adapter's delta. `frame` is `frame_of`, or a cached version of it.

    On one A the inner product of two sketches estimates <ΔW_a, ΔW_b>; on two different A's it is about zero.
    """
    out = np.zeros(NUM_BUCKETS)
    for module, b in adapter.modules.items():
        module_frame = frame(adapter.basis, module, b.shape[1], adapter.shape_of(module)[1])
        delta = (adapter.config.scale_of(module) * b.dense(torch.float64) @ module_frame.factor).numpy()  # (D, min(R, N))
        out += _count_sketch(delta, module_frame.key)
    return out


def _count_sketch(matrix: NDArray[np.float64], key: int) -> NDArray[np.float64]:
    """Return the count sketch (W,) of a matrix (D, C). Bucket and sign of an entry are hashes of (key, row, column)."""
    rows, columns = np.ogrid[: matrix.shape[0], : matrix.shape[1]]
    hashed = _mix((rows.astype(np.uint64) << np.uint64(32) | columns.astype(np.uint64)) ^ np.uint64(key))
    buckets = (hashed % np.uint64(NUM_BUCKETS)).astype(np.int64)
    signed = np.where(hashed >> np.uint64(63), matrix, -matrix)
    return np.asarray(np.bincount(buckets.ravel(), signed.ravel(), NUM_BUCKETS), np.float64)


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a hash of each word, uint64, with the finalizer of MurmurHash3 (Appleby 2011)."""
    words = (words ^ words >> np.uint64(33)) * np.uint64(0xFF51AFD7ED558CCD)
    words = (words ^ words >> np.uint64(33)) * np.uint64(0xC4CEB9FE1A85EC53)
    return words ^ words >> np.uint64(33)


def _sketches(entries: Mapping[str, Callable[[], Adapter]]) -> tuple[NDArray[np.float32], Sequence[str]]:
    """Return the sketches (n, W), normalized to length 1 (or 0 for a zero delta), and the digest of each adapter's base model."""
    frame = functools.lru_cache(NUM_FRAMES)(frame_of)
    out = np.zeros((len(entries), NUM_BUCKETS), np.float32)
    digests = []
    for i, load in enumerate(tqdm(entries.values(), desc="sketching", unit="adapter", disable=None)):
        adapter = load()
        row = sketch(adapter, frame)
        norm = np.linalg.norm(row)
        out[i] = row / norm if norm > 0 else row  # divided in fp64, since fp32 may not hold the values
        digests.append(adapter.config.lori.base_digest)
    return out, digests


def _candidates(sketches: NDArray[np.float32], digests: Sequence[str], min_cosine: float) -> dict[int, list[int]]:
    """Return, for each adapter, the later adapters of its base model whose sketches have at least the cosine `min_cosine`."""
    out: defaultdict[int, list[int]] = defaultdict(list)
    for start in range(0, len(sketches), BLOCK):
        cosines = sketches[start : start + BLOCK] @ sketches[start:].T
        for i, j in np.argwhere(np.triu(cosines >= min_cosine, 1)).tolist():
            if digests[start + i] == digests[start + j]:
                out[start + i].append(start + j)
    return out


def _groups(names: Sequence[str]) -> Iterator[Sequence[str]]:
    return (names[start : start + GROUP] for start in range(0, len(names), GROUP))
