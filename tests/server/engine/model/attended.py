"""Ops under test, and the exact sums that their attention must equal.

Allowed errors are relative to the magnitudes that went into a sum: the values that a token weighs, |gated| * |up|, the norm.
Keys and values lie in memory that was full of NaN or infinities: a sequence may read only what it wrote itself.
Shapes: T tokens of a step, L keys, H heads, G key-value heads, E head size, D width.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import pytest
import torch

from lori.native import MODULE, instruction_sets
from server.engine.model.decoder import Heads, Norm, Ops, Rotary, Span
from server.engine.model.native_ops import NativeOps
from server.engine.model.torch_ops import TorchOps
from server.engine.model.triton_ops import GpuOps
from tests.cases import all_pairs
from tests.interpreter import INTERPRETED

BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = [FP32, BF16]
CPU = torch.device("cpu")
ROUNDING = {FP32: 2.0**-24, BF16: 2.0**-8}
NATIVE = instruction_sets()
IMPLEMENTATIONS = ["torch", pytest.param("triton", marks=INTERPRETED), *NATIVE]
CODE = [*product(["torch", "triton", *NATIVE], DTYPES)]


def make_ops(implementation: str, heads: Sequence[Heads], num_blocks: int, block_size: int, dtype: torch.dtype) -> Ops:
    """Return torch's ops, a GPU's in Triton's interpreter, or those in C++ of an instruction set."""
    if implementation == "torch":
        return TorchOps(heads, num_blocks, block_size, dtype, CPU)
    if implementation == "triton":
        return GpuOps(heads, num_blocks, block_size, dtype, CPU)
    ops = NativeOps(heads, num_blocks, block_size, dtype)
    ops._layers = MODULE.Layers(implementation, str(dtype).removeprefix("torch."))
    return ops


def fill(ops: Any, dtype: torch.dtype, value: float) -> None:
    """Fill the memory of keys and values."""
    for memory in ops._memory:
        memory.view(dtype).fill_(value)


HEADS = Heads(num_heads=4, num_kv_heads=2, head_size=32, scale=32**-0.5)
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def each_case(names: str, *axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize by every pair of values of two axes, called `names`, and of an implementation and its dtype."""
    cases = [(*values, dtype, implementation) for *values, (implementation, dtype) in all_pairs(*axes, CODE)]
    marks = [INTERPRETED if implementation == "triton" else () for *_, implementation in cases]
    params = [pytest.param(*case, marks=mark) for case, mark in zip(cases, marks, strict=True)]
    return pytest.mark.parametrize(f"{names},dtype,implementation", params)


def weights(size: int, seed: int = 0) -> torch.Tensor:
    """Return the weight of a norm (E,)."""
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) * 3 - 1


def rotary_at(positions: Sequence[int], size: int) -> Rotary:
    """Return cosines and sines (T, E) whose halves differ, so that one is not taken for the other."""
    at = torch.tensor(positions, dtype=torch.float64)[:, None] * torch.logspace(0, -2, size, dtype=torch.float64)
    return at.cos().float().contiguous(), at.sin().float().contiguous()


@dataclass
class History:
    """The keys and values (L, G, E) of one sequence, as they were rounded, and its blocks."""

    blocks: list[int]
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)


def rotated(x: torch.Tensor, norm: Norm | None, rotary: Rotary) -> torch.Tensor:
    """Return x (T, H, E) normalised and rotated, rounded to its dtype."""
    wide = x.float()
    if norm is not None:
        wide = (wide.double() / (wide.double().square().mean(-1, keepdim=True) + norm.epsilon).sqrt()).float() * norm.weight
    cosine, sine = (part[:, None].double() for part in rotary)
    low, high = wide.double().chunk(2, -1)
    return (wide.double() * cosine + torch.cat([-high, low], -1) * sine).to(x.dtype)


def attend_exactly(query: torch.Tensor, history: History, position: int, heads: Heads) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what queries (T, H, E) from `position` on attend to, (T, H, E), and sum of weight * |value|; in fp64."""
    group = heads.num_heads // heads.num_kv_heads
    keys, values = (
        torch.stack(rows).double().repeat_interleave(group, 1) for rows in (history.keys, history.values)
    )  # (L, H, E)
    scores = torch.einsum("the,lhe->htl", query.double(), keys) * heads.scale
    if heads.softcap:
        scores = heads.softcap * torch.tanh(scores / heads.softcap)
    distance = position + torch.arange(len(query))[:, None] - torch.arange(len(keys))  # (T, L)
    hidden = (distance < 0) | (distance >= heads.window if heads.window else torch.tensor(False))
    share = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("htl,lhe->the", share, values), torch.einsum("htl,lhe->the", share, values.abs())


Work = tuple[str, int]
"""A sequence's name, and the number of its tokens in a step."""


@dataclass
class Rig:
    """Ops under test, and the histories of the sequences that they have seen. Blocks are allocated in a random order."""

    ops: Ops
    heads: Heads
    block_size: int
    dtype: torch.dtype
    free: list[int]
    implementation: str
    histories: dict[str, History] = field(default_factory=dict)
    num_steps: int = 0
    layer: int = 0

    @classmethod
    def of(
        cls,
        implementation: str,
        heads: Heads,
        dtype: torch.dtype,
        block_size: int = 16,
        num_blocks: int = 24,
        poison: float = float("nan"),
    ) -> "Rig":
        """Start with memory full of `poison`."""
        ops = make_ops(implementation, [heads], num_blocks, block_size, dtype)
        fill(ops, dtype, poison)
        free = random.Random(0).sample(range(num_blocks), num_blocks)
        return cls(ops, heads, block_size, dtype, free, implementation)

    def plan(self, work: Sequence[Work]) -> tuple[list[Span], torch.Tensor, Rotary]:
        """Return the spans, qkv (T, (H + 2 G) E) and the cosines and sines of a step."""
        spans: list[Span] = []
        positions: list[int] = []
        for name, num_tokens in work:
            history = self.histories.setdefault(name, History([]))
            position = len(history.keys)
            while len(history.blocks) * self.block_size < position + num_tokens:
                history.blocks.append(self.free.pop())
            spans.append(Span(len(positions), num_tokens, position, tuple(history.blocks)))
            positions += range(position, position + num_tokens)
        self.num_steps += 1
        width = (self.heads.num_heads + 2 * self.heads.num_kv_heads) * self.heads.head_size
        qkv = torch.randn(len(positions), width, generator=torch.Generator().manual_seed(self.num_steps)).to(self.dtype)
        return spans, qkv, rotary_at(positions, self.heads.head_size)

    def run(self, *work: Work) -> torch.Tensor:
        """Run a step, unchecked, and return what its tokens attend to."""
        spans, qkv, rotary = self.plan(work)
        self.remember(work, spans, qkv, rotary)
        return self.ops.attend(qkv, self.layer, self.heads, rotary, self.ops.plan(spans))

    def check(self, *work: Work) -> None:
        """Run a step, each token of which must be within its roundings."""
        spans, qkv, rotary = self.plan(work)
        query = self.remember(work, spans, qkv, rotary)
        out = self.ops.attend(qkv, self.layer, self.heads, rotary, self.ops.plan(spans))
        parts = [
            attend_exactly(query[span.row : span.row + span.num_tokens], self.histories[name], span.position, self.heads)
            for (name, _), span in zip(work, spans, strict=True)
        ]
        exact, magnitude = (torch.cat(rows).flatten(1) for rows in zip(*parts, strict=True))
        assert out.dtype is self.dtype
        assert_attended(out, exact, magnitude, self.implementation)

    def remember(self, work: Sequence[Work], spans: Sequence[Span], qkv: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        """Append a step's keys and values to the histories, and return its rotated queries (T, H, E)."""
        heads, g = self.heads, self.heads.num_kv_heads
        query, key, value = qkv.clone().unflatten(1, (-1, heads.head_size)).split([heads.num_heads, g, g], 1)
        key = rotated(key, heads.key_norm, rotary)
        for (name, _), span in zip(work, spans, strict=True):
            rows = slice(span.row, span.row + span.num_tokens)
            self.histories[name].keys += key[rows]
            self.histories[name].values += value[rows]
        return rotated(query, heads.query_norm, rotary)


OFF = {
    ("native", FP32): 1e-5,
    ("torch", FP32): 1e-5,
    ("native", BF16): 3 * 2.0**-8,  # weights and what comes out are rounded; a rotated key may be rounded the other way
    ("torch", BF16): 8 * 2.0**-8,  # and queries times the scale, and scores
}


def assert_attended(out: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, implementation: str) -> None:
    allowed = OFF["native" if implementation in NATIVE else "torch", out.dtype] * magnitude
    excess = (out.double() - exact).abs() - allowed
    assert out.shape == exact.shape
    assert (excess <= 0).all(), f"off by {excess.max().item()} more than allowed"  # NaN fails too


def heads_of(num_heads: int, num_kv_heads: int, head_size: int, **changes: Any) -> Heads:
    """Return heads whose scores are of about 1."""
    fields = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_size": head_size, "scale": head_size**-0.5}
    return Heads(**(fields | changes))
