"""Steps of one module for the kernel benchmark: adapters, tokens, and the same work with dense products.

Shapes: T tokens, N inputs, D outputs, R rank, S slots.
"""

import importlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch.nn import functional as F

from lori.kernels import Operands, Packed, Route, Term, add_delta
from lori.sparse import SparseB
from tests.bench.timing import Call

RANK, DENSITY = 32, 0.1
SPARE = 4
"""Resident adapters for each adapter that a step of up to 128 tokens uses, so that the used ones are not adjacent in memory."""
NUM_DRAWN = 16
"""Number of different random B's. Slots hold copies of them, each in memory of its own."""
COLD_BYTES = 2**27
"""Bytes that a cold step cycles through: more than the last-level cache of the machines that run this."""
MAX_DENSE_BYTES = 2**27
"""Maximum bytes of gathered dense B's. Larger dense products are not measured."""

POPULARITY: dict[str, Callable[[int, int], list[list[int]]]] = {
    "identical": lambda tokens, terms: [list(range(terms))] * tokens,
    "zipf": lambda tokens, terms: _drawn(tokens, terms, [1 / (i + 1) for i in range(max(tokens, terms))]),
    "uniform": lambda tokens, terms: _drawn(tokens, terms, [1.0] * max(tokens, terms)),
    "distinct": lambda tokens, terms: [[(t + k) % max(tokens, terms) for k in range(terms)] for t in range(tokens)],
}
"""Functions from (tokens, terms) to the adapter indices of each token's terms. `Step.of` maps the indices to slots."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One module of a model: B is (D, R), W is (D, N)."""

    model: str
    num_outputs: int
    num_inputs: int

    @property
    def name(self) -> str:
        """Name of the shape, such as 576x576."""
        return f"{self.num_outputs}x{self.num_inputs}"


SHAPES = [
    Shape("SmolLM2-135M", 576, 576), Shape("SmolLM2-135M", 192, 576), Shape("SmolLM2-135M", 1536, 576),
    Shape("SmolLM2-135M", 576, 1536), Shape("Llama-3-8B", 4096, 4096), Shape("Llama-3-8B", 1024, 4096),
    Shape("Llama-3-8B", 14336, 4096), Shape("Llama-3-8B", 4096, 14336),
]  # fmt: skip


class Module:
    """One module, in several identical copies if it is cold. Calls cycle through the copies, so that none is in a cache."""

    def __init__(self, shape: Shape, num_used: int, spare: int, is_cold: bool, device: torch.device) -> None:
        self.shape, self.num_slots, self.device, self.is_cold = shape, num_used * spare, device, is_cold
        packed = drawn(shape.num_outputs)
        first = Operands(self.num_slots, RANK, shape.num_outputs, torch.bfloat16, device)
        first.reserve(sum(len(packed[slot % NUM_DRAWN].blocks) for slot in range(self.num_slots)))
        for slot in range(self.num_slots):
            first.put(slot, packed[slot % NUM_DRAWN], 0)
        self.operands = [first, *(copy_of(first) for _ in range(self.num_copies(len(first.pool) // spare) - 1))]
        weight = torch.randn(shape.num_outputs + RANK, shape.num_inputs, dtype=torch.bfloat16, device=device)
        self.weights = self.cycle(weight)

    def products(self, num_tokens: int) -> dict[str, Call]:
        """Return calls of the base product of `num_tokens`: without A's rows ("base") and with A's rows below W ("fused")."""
        num_outputs = self.shape.num_outputs
        x = torch.randn(num_tokens, self.shape.num_inputs, dtype=torch.bfloat16, device=self.device)
        return {
            "base": lambda: F.linear(x, next(self.weights)[:num_outputs]),
            "fused": lambda: F.linear(x, next(self.weights)),
        }

    def cycle(self, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        """Return an endless iterator over `tensor` and its copies, as many copies as keep all of them out of the caches."""
        return itertools.cycle([tensor, *(tensor.clone() for _ in range(self.num_copies(tensor.nbytes) - 1))])

    def num_copies(self, num_bytes: int) -> int:
        """Return the number of copies for a tensor of `num_bytes`; 1 if the module is hot."""
        return -(-COLD_BYTES // num_bytes) if self.is_cold else 1


def drawn(num_outputs: int) -> list[Packed]:
    """Return random B's (D, R) with a tenth of their entries nonzero."""
    g = torch.Generator().manual_seed(0)
    layout = Operands(0, RANK, num_outputs, torch.bfloat16, "cpu")
    b = (0.02 * torch.randn(num_outputs, RANK, generator=g) for _ in range(NUM_DRAWN))
    return [layout.pack(SparseB.from_dense(dense, torch.rand(num_outputs, RANK, generator=g) < DENSITY)) for dense in b]


def copy_of(operands: Operands) -> Operands:
    """Return a copy of `operands` in other memory."""
    return Operands.from_arrays(operands.layout, operands.pool.clone(), operands.starts, operands.basis_of)


@dataclass(frozen=True, slots=True)
class Step:
    """One step on a module: the slots of each token's terms, and the work as calls to time."""

    module: Module
    slots: Sequence[Sequence[int]]

    @classmethod
    def of(cls, module: Module, popularity: str, num_tokens: int, num_terms: int) -> "Step":
        """Return the step of a popularity. Its adapters are in random slots of the pool."""
        slots = list(range(module.num_slots))
        random.Random(0).shuffle(slots)
        return cls(
            module, [[slots[i] for i in token_adapters] for token_adapters in POPULARITY[popularity](num_tokens, num_terms)]
        )

    @property
    def num_bytes(self) -> int:
        """Number of bytes of the blocks that the step must read at least once."""
        operands = self.module.operands[0]
        return sum(operands.num_slot_bytes(slot) for slot in {slot for token_slots in self.slots for slot in token_slots})

    def calls(self) -> dict[str, Call]:
        """Return calls of the expand and, if its B's are not too large, of the dense product."""
        shape, device, num_tokens = self.module.shape, self.module.device, len(self.slots)
        output = torch.randn(num_tokens, shape.num_outputs + RANK, dtype=torch.bfloat16, device=device)
        y, s = output[:, : shape.num_outputs], output[:, shape.num_outputs :].unflatten(1, (1, RANK))
        terms = [Term(t, t + 1, slot, 1e-3) for t, token_slots in enumerate(self.slots) for slot in token_slots]
        route, operands = Route.from_terms(terms, num_tokens, device), itertools.cycle(self.module.operands)
        calls: dict[str, Call] = {"expand": lambda: add_delta(y, s, next(operands), route)}
        if num_tokens * len(self.slots[0]) * RANK * shape.num_outputs * 2 <= MAX_DENSE_BYTES:
            calls["dense"] = self._dense(s, y)
        return calls

    def _dense(self, s: torch.Tensor, y: torch.Tensor) -> Call:
        num_outputs, num_terms = self.module.shape.num_outputs, len(self.slots[0])
        if s.is_cuda:
            b = torch.randn(self.module.num_slots, RANK, num_outputs, dtype=torch.bfloat16, device=s.device)
            pools, slots = self.module.cycle(b), torch.tensor(self.slots, dtype=torch.int32, device=s.device)
            return lambda: load_bgmv()(y, s[:, 0], next(pools), slots, 1e-3)
        # The dense B is gathered in advance, so only the product is timed.
        gathered = self.module.cycle(torch.ones(len(y), num_terms * RANK, num_outputs, dtype=torch.bfloat16))
        repeated = s.repeat(1, 1, num_terms) * 1e-3  # (T, 1, terms R)
        return lambda: y.add_(torch.bmm(repeated, next(gathered)).squeeze(1))


@cache
def load_bgmv() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], None]:
    """Return the dense Triton kernel. The import is late, since a machine without a GPU may have no Triton."""
    kernel: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], None]
    kernel = importlib.import_module("tests.bench.bgmv").bgmv
    return kernel


def _drawn(tokens: int, terms: int, weights: Sequence[float]) -> list[list[int]]:
    rng = random.Random(0)
    return [_different(rng, terms, weights) for _ in range(tokens)]


def _different(rng: random.Random, terms: int, weights: Sequence[float]) -> list[int]:
    chosen: dict[int, None] = {}
    while len(chosen) < terms:
        chosen[rng.choices(range(len(weights)), weights)[0]] = None
    return list(chosen)
