"""The frozen A of LoRI (arXiv 2504.07448, section 3.1): drawn from a seed, never stored.

The bit stream is NumPy's Philox, which NumPy promises not to change; the mapping from bits to floats is written here, so no
library's change of distribution code can move a basis. Knows nothing of B, files or models.

Shapes: R rank, N inputs of a module.
"""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

GENERATOR = "philox-u24-1"
"""Names the bit stream and the mapping below; another mapping would be another name."""


@dataclass(frozen=True, slots=True)
class Basis:
    """One frozen A for every module of a model, named by what it is drawn from."""

    seed: int = 0
    stream: int = 0
    generator: str = GENERATOR

    def __post_init__(self) -> None:
        if self.generator != GENERATOR:
            raise ValueError(f"basis generator is {self.generator!r}, expected {GENERATOR!r}")
        for field in ("seed", "stream"):
            value = getattr(self, field)
            if not 0 <= value < 2**63:
                raise ValueError(f"basis {field} is {value}, expected 0 <= {field} < 2**63")

    def draw(self, module: str, rank: int, num_inputs: int) -> torch.Tensor:
        """Returns A of `module`, (R, N) fp32 on the CPU, uniform in ±1/sqrt(N) (PEFT's Kaiming-uniform bound).

        Row-major from one stream, so A of a smaller rank is the first rows of A of a larger one.
        """
        count = rank * num_inputs
        key = hashlib.sha256(f"{self.generator}|{self.seed}|{self.stream}|{module}".encode()).digest()[:16]
        words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw((count + 1) // 2)
        halves = words.astype("<u8").view("<u4")[:count]
        # 24 bits are exact in fp32; the half step makes the values symmetric about zero.
        unit = ((halves >> 8).astype(np.float64) + 0.5) * 2.0**-23 - 1.0
        return torch.from_numpy((unit / np.sqrt(num_inputs)).astype(np.float32).reshape(rank, num_inputs))

    def digest(self, shapes: Mapping[str, tuple[int, int]]) -> str:
        """Returns the sha256 (hex) of A over `shapes`, module name -> (R, N): proves that a basis was drawn again right.

        Remembered: adapters on one basis ask for the same one.
        """
        return _digest(self, tuple(sorted(shapes.items())))


@functools.lru_cache(maxsize=64)
def _digest(basis: Basis, shapes: tuple[tuple[str, tuple[int, int]], ...]) -> str:
    sha = hashlib.sha256()
    for module, (rank, num_inputs) in shapes:
        sha.update(f"{module}|{rank}|{num_inputs}|".encode())
        sha.update(basis.draw(module, rank, num_inputs).numpy().astype("<f4").tobytes())
    return sha.hexdigest()
