"""The frozen A of LoRI (arXiv 2504.07448, section 3.1): drawn from a seed and never stored, or stored (explicit) for an import.

The bit stream is NumPy's Philox, which NumPy promises not to change. The mapping from bits to floats is written here, so a change
in a library's distribution code cannot change a basis. This module knows nothing of B, files or models.

Shapes: R rank, N inputs of a module.
"""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
import torch

GENERATOR = "philox-u24-1"
"""Name of the bit stream and the mapping below. A different mapping needs a different name."""
PIECE = 2**20
"""Number of entries of A that are drawn at once; even, since one word of the stream gives two entries."""


@dataclass(frozen=True, slots=True)
class Seeded:
    """A frozen A for every module of any model, defined by seed, stream and generator."""

    seed: int = 0
    stream: int = 0
    generator: str = GENERATOR

    def __post_init__(self) -> None:
        if self.generator != GENERATOR:
            raise ValueError(f"basis generator is {self.generator!r}, expected {GENERATOR!r}")
        for name in ("seed", "stream"):
            value = getattr(self, name)
            if not 0 <= value < 2**63:
                raise ValueError(f"basis {name} is {value}, expected 0 <= {name} < 2**63")

    def __str__(self) -> str:
        return f"seed {self.seed}, stream {self.stream}"

    def draw(self, module: str, rank: int, num_inputs: int) -> torch.Tensor:
        """Return A of `module`, (R, N) fp32 on the CPU, uniform in ±1/sqrt(N) (PEFT's Kaiming-uniform bound).

        The entries come row-major from one stream, so A of a smaller rank is the first rows of A of a larger rank.
        """
        count = rank * num_inputs
        key = hashlib.sha256(f"{self.generator}|{self.seed}|{self.stream}|{module}".encode()).digest()[:16]
        bits, drawn = np.random.Philox(key=int.from_bytes(key, "little")), np.empty(count, np.float32)
        for begin in range(0, count, PIECE):  # a draw of all entries at once would take seven times the memory of A
            piece = drawn[begin : begin + PIECE]
            halves = bits.random_raw((len(piece) + 1) // 2).astype("<u8").view("<u4")[: len(piece)]
            # 24 bits are exact in fp32; the half step makes the values symmetric about zero.
            unit = ((halves >> 8).astype(np.float64) + 0.5) * 2.0**-23 - 1.0
            piece[:] = unit / np.sqrt(num_inputs)
        return torch.from_numpy(drawn.reshape(rank, num_inputs))

    def digest(self, shapes: Mapping[str, tuple[int, int]]) -> str:
        """Return the sha256 (hex) of A over `shapes`, module name -> (R, N). Equal digests prove that A was redrawn correctly.

        Cached, since adapters on one basis ask for the same digest.
        """
        return _drawn_digest(self, tuple(sorted(shapes.items())))


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Explicit:
    """A stored A. `tensors` maps a module to its A, (R, N). Bases with equal digests are equal."""

    content_digest: str
    """`tensors_digest` of `tensors`."""
    tensors: Mapping[str, torch.Tensor] = field(compare=False, repr=False)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> "Explicit":
        """Return the basis that holds `tensors`, (R, N) each, identified by their content in fp32."""
        return cls(tensors_digest(tensors), tensors)

    def __str__(self) -> str:
        return explicit_name(self.content_digest)

    def draw(self, module: str, rank: int, num_inputs: int) -> torch.Tensor:
        """Return the first `rank` rows of A of `module`, (rank, N) fp32. Missing rows and modules are zero.

        `num_inputs` must equal N of the stored A if the module has one.
        """
        out = torch.zeros(rank, num_inputs)
        if (a := self.tensors.get(module)) is not None:
            rows = min(rank, a.shape[0])
            out[:rows] = a[:rows]
        return out

    def digest(self, shapes: Mapping[str, tuple[int, int]]) -> str:
        """Return the sha256 (hex) of A over `shapes`, module name -> (R, N), as `Seeded.digest` does. Cached, too."""
        key = tuple(sorted(shapes.items()))
        digests = _explicit_digests.setdefault(self, {})
        if key not in digests:
            digests[key] = tensors_digest({module: self.draw(module, *shape) for module, shape in shapes.items()})
        return digests[key]


_explicit_digests: "WeakKeyDictionary[Explicit, dict[tuple[tuple[str, tuple[int, int]], ...], str]]" = WeakKeyDictionary()

Basis = Seeded | Explicit


def explicit_name(digest: str) -> str:
    """Return the name, for people, of the explicit basis with this digest."""
    return f"its own A, {digest[:12]}"


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the sha256 (hex) of one A: names, shapes and values in fp32, in order of name."""
    sha = hashlib.sha256()
    for module in sorted(tensors):
        _update(sha, module, tensors[module])
    return sha.hexdigest()


@functools.lru_cache(maxsize=64)
def _drawn_digest(basis: Seeded, shapes: tuple[tuple[str, tuple[int, int]], ...]) -> str:
    sha = hashlib.sha256()
    for module, (rank, num_inputs) in shapes:
        _update(sha, module, basis.draw(module, rank, num_inputs))
    return sha.hexdigest()


def _update(sha: "hashlib._Hash", module: str, a: torch.Tensor) -> None:
    sha.update(f"{module}|{a.shape[0]}|{a.shape[1]}|".encode())
    sha.update(a.float().contiguous().numpy().astype("<f4", copy=False).data)
