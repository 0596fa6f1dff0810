"""Norm, gate and attention beside a layer's products: in C++ and in torch, against loops in fp64.

What a test calls off is in units of what went into a sum: of the values that a token weighs, of |gated| * |up|, of the norm.
Keys and values lie in memory that was full of what is not finite: only what a sequence wrote itself may be read.
Shapes: T tokens of a step, L keys, H heads, G key-value heads, E head size, D width.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from lori.kernels.native import MODULE, instruction_sets
from server.engine.decoder import Heads, Norm, Ops, Turns
from server.engine.native_ops import NativeOps
from server.engine.spans import Span
from server.engine.torch_ops import TorchOps

BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = [FP32, BF16]
CPU = torch.device("cpu")
ROUNDING = {FP32: 2.0**-24, BF16: 2.0**-8}
POISON = {"nan": 0xFF, "large": 0x7F}  # every byte: NaN in both dtypes, 3.4e38 in both
NATIVE = instruction_sets()
IMPLEMENTATIONS = ["torch", *NATIVE]


def make_ops(implementation: str, heads: Sequence[Heads], num_blocks: int, block_size: int, dtype: torch.dtype) -> Ops:
    """Returns torch's ops, or those in C++ of an instruction set."""
    if implementation == "torch":
        return TorchOps(heads, num_blocks, block_size, dtype, CPU)
    ops = NativeOps(heads, num_blocks, block_size, dtype)
    module: Any = MODULE
    ops._layers = module.Layers(implementation, str(dtype).removeprefix("torch."))
    return ops


def poison(ops: Any, byte: int) -> None:
    """Fills the memory of keys and values with a byte."""
    for memory in ops._memory:
        memory.view(torch.uint8).fill_(byte)


HEADS = Heads(num_heads=4, num_kv_heads=2, head_size=32, scale=32**-0.5)
needs_native = pytest.mark.skipif(not NATIVE, reason="the module is missing")
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True)
def num_threads() -> Iterator[Callable[[int], None]]:
    """One thread, and what sets another number for one test."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def weights(size: int, seed: int = 0) -> torch.Tensor:
    """Returns the weight of a norm (E,)."""
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) * 3 - 1


# --- norm


@each_implementation
@each_dtype
@pytest.mark.parametrize("is_added", [False, True])
@pytest.mark.parametrize(("num_rows", "size"), [(1, 16), (3, 48), (65, 96), (5, 4096), (130, 576)])
def test_norm(num_rows: int, size: int, is_added: bool, dtype: torch.dtype, implementation: str) -> None:
    g = torch.Generator().manual_seed(size)
    stream = (torch.randn(num_rows, size, generator=g) * torch.logspace(-3, 3, num_rows)[:, None]).to(dtype)
    added = torch.randn(num_rows, size, generator=g).to(dtype) if is_added else None
    norm, before = Norm(weight=weights(size), epsilon=1e-5), stream.clone()
    out = make_ops(implementation, [HEADS], 1, 16, dtype).norm(stream, added, norm)
    assert torch.equal(stream, before if added is None else before + added)  # to the bit, as rounded
    exact = stream.double()
    exact = exact / (exact.square().mean(1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    assert out.dtype is dtype
    assert ((out.double() - exact).abs() <= (ROUNDING[dtype] + 2e-6) * exact.abs()).all()


@each_implementation
@each_dtype
def test_norm_of_extremes(dtype: torch.dtype, implementation: str) -> None:
    rows = [torch.zeros(32), torch.full((32,), 1e-15), torch.full((32,), 1e15), torch.full((32,), -3.0), torch.ones(32)]
    stream = torch.stack(rows).to(dtype)
    stream[3, 5] = torch.nan
    out = make_ops(implementation, [HEADS], 1, 16, dtype).norm(stream, None, Norm(weight=torch.ones(32), epsilon=1e-6))
    assert out[0].eq(0).all()
    torch.testing.assert_close(out[1], stream[1] * 1000, rtol=1e-2, atol=0)
    assert out[2].eq(1).all()
    assert out[3].isnan().all()
    torch.testing.assert_close(out[4], stream[4], rtol=1e-5, atol=0)


# --- gate

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "gelu": lambda x: 0.5 * x * torch.erfc(-x * 0.5**0.5),
}


@each_implementation
@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("num_rows", "size"), [(1, 16), (3, 48), (33, 80), (2, 4096)])
def test_gate(num_rows: int, size: int, activation: str, dtype: torch.dtype, implementation: str) -> None:
    g = torch.Generator().manual_seed(size)
    x = (torch.randn(num_rows, 2 * size, generator=g) * 3).to(dtype)
    out = make_ops(implementation, [HEADS], 1, 16, dtype).gate(x, activation)
    assert_gated(out, x, activation, implementation)


def assert_gated(out: torch.Tensor, x: torch.Tensor, activation: str, implementation: str) -> None:
    gated, up = x.double().chunk(2, 1)
    exact = ACTIVATIONS[activation](gated) * up
    num_roundings = 1 if implementation in NATIVE else 2  # torch rounds the activation before it is multiplied
    allowed = num_roundings * ROUNDING[x.dtype] * exact.abs() + 1e-6 * (gated * up).abs() + 2.0**-126 * (1 + up.abs())
    excess = (out.double() - exact).abs() - allowed
    assert out.shape == exact.shape
    assert (excess <= 0).all(), f"off by {excess.max().item()} more than allowed"


@each_implementation
@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_of_what_is_large_or_small(activation: str, dtype: torch.dtype, implementation: str) -> None:
    sizes = torch.cat([torch.logspace(-37, 38, 151), torch.linspace(60, 120, 121)])
    gated = torch.cat([sizes, -sizes, torch.zeros(16)])
    gated = torch.cat([gated, torch.full((-len(gated) % 16,), -88.0)])
    x = torch.cat([gated, torch.full_like(gated, 0.5)])[None].to(dtype)
    out = make_ops(implementation, [HEADS], 1, 16, dtype).gate(x, activation)
    assert_gated(out, x, activation, implementation)
    least = out[0][x[0, : len(gated)] < -100]
    assert least.abs().max() < 1e-30, "what is far below zero lets nothing pass"


@each_implementation
@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_a_number_passes_the_gate_alone(activation: str, dtype: torch.dtype, implementation: str) -> None:
    x = torch.ones(2, 64, dtype=dtype)
    x[0, 3] = x[1, 32 + 5] = torch.nan
    out = make_ops(implementation, [HEADS], 1, 16, dtype).gate(x, activation)
    assert out.isnan().nonzero().tolist() == [[0, 3], [1, 5]]


# --- attention: what a step is, and the loop over tokens that it is held to


def turns_at(positions: Sequence[int], size: int) -> Turns:
    """Returns turns (T, E) whose halves differ, so that one is not taken for the other."""
    at = torch.tensor(positions, dtype=torch.float64)[:, None] * torch.logspace(0, -2, size, dtype=torch.float64)
    return at.cos().float().contiguous(), at.sin().float().contiguous()


@dataclass
class Story:
    """The keys and values (L, G, E) of one sequence, as they were rounded, and its blocks."""

    blocks: list[int]
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)


def turned(x: torch.Tensor, norm: Norm | None, turns: Turns) -> torch.Tensor:
    """Returns x (T, H, E) normalised and turned, rounded to its dtype."""
    wide = x.float()
    if norm is not None:
        wide = (wide.double() / (wide.double().square().mean(-1, keepdim=True) + norm.epsilon).sqrt()).float() * norm.weight
    cosine, sine = (of[:, None].double() for of in turns)
    low, high = wide.double().chunk(2, -1)
    return (wide.double() * cosine + torch.cat([-high, low], -1) * sine).to(x.dtype)


def attend_alone(query: torch.Tensor, story: Story, position: int, heads: Heads) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what the token at `position` attends to, (H, E), and sum of weight * |value|; query (H, E)."""
    first = max(0, position - heads.window + 1) if heads.window else 0
    keys = torch.stack(story.keys[first : position + 1]).double()  # (L, G, E)
    values = torch.stack(story.values[first : position + 1]).double()
    group = heads.num_heads // heads.num_kv_heads
    out, magnitude = [], []
    for head in range(heads.num_heads):
        scores = keys[:, head // group] @ query[head].double() * heads.scale
        if heads.softcap:
            scores = heads.softcap * torch.tanh(scores / heads.softcap)
        share = scores.softmax(0)
        out.append(share @ values[:, head // group])
        magnitude.append(share @ values[:, head // group].abs())
    return torch.stack(out), torch.stack(magnitude)


@dataclass
class Rig:
    """Ops under test, and the stories of the sequences that they have seen."""

    ops: Ops
    heads: Heads
    block_size: int
    dtype: torch.dtype
    free: list[int]
    stories: dict[str, Story] = field(default_factory=dict)
    seed: int = 0
    layer: int = 0

    @classmethod
    def of(
        cls, implementation: str, heads: Heads, dtype: torch.dtype, block_size: int = 16, num_blocks: int = 24, byte: int = 0xFF
    ) -> "Rig":
        """Memory full of `byte`, and blocks that are given out in a random order."""
        ops = make_ops(implementation, [heads], num_blocks, block_size, dtype)
        poison(ops, byte)
        return cls(ops, heads, block_size, dtype, random.Random(0).sample(range(num_blocks), num_blocks))

    def step(self, *work: tuple[str, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Runs (sequence, tokens) of one step, tokens 0 of none; returns what came out, what is exact, what goes into it."""
        spans, qkv, positions = self.plan(work)
        turns = turns_at(positions, self.heads.head_size)
        out = self.ops.attend(qkv.clone(), self.layer, self.heads, turns, self.ops.plan(spans))
        exact, magnitude = self.expected(work, spans, qkv, turns)
        assert out.shape == exact.shape
        assert out.dtype is self.dtype
        return out, exact, magnitude

    def plan(self, work: Sequence[tuple[str, int]]) -> tuple[list[Span], torch.Tensor, list[int]]:
        """Returns the spans, qkv (T, (H + 2 G) E) and positions of a step."""
        spans: list[Span] = []
        positions: list[int] = []
        for name, num_tokens in work:
            story = self.stories.setdefault(name, Story([]))
            position = len(story.keys)
            while len(story.blocks) * self.block_size < position + num_tokens:
                story.blocks.append(self.free.pop())
            spans.append(Span(len(positions), num_tokens, position, tuple(story.blocks)))
            positions += range(position, position + num_tokens)
        heads, self.seed = self.heads, self.seed + 1
        width = (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_size
        qkv = torch.randn(len(positions), width, generator=torch.Generator().manual_seed(self.seed)).to(self.dtype)
        return spans, qkv, positions

    def expected(
        self, work: Sequence[tuple[str, int]], spans: Sequence[Span], qkv: torch.Tensor, turns: Turns
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the exact outcome (T, H E) of a step, and what goes into it; the stories go on."""
        heads = self.heads
        query, key, value = qkv.unflatten(1, (-1, heads.head_size)).split(
            [heads.num_heads, heads.num_kv_heads, heads.num_kv_heads], 1
        )
        query, key = turned(query, heads.query_norm, turns), turned(key, heads.key_norm, turns)
        rows = []
        for (name, _), span in zip(work, spans, strict=True):
            story, of = self.stories[name], slice(span.row, span.row + span.num_tokens)
            story.keys += key[of]
            story.values += value[of]
            rows += [attend_alone(query[span.row + i], story, span.position + i, heads) for i in range(span.num_tokens)]
        exact, magnitude = (torch.stack(parts).flatten(1) for parts in zip(*rows, strict=True))
        return exact, magnitude

    def check(self, *work: tuple[str, int]) -> None:
        """A step is within its roundings."""
        out, exact, magnitude = self.step(*work)
        assert_attended(out, exact, magnitude)


def assert_attended(out: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor) -> None:
    # bf16: weights and output are rounded, in torch scores and queries too; a turned key that is rounded the other way is another.
    allowed = {FP32: 1e-5, BF16: 2.0**-6}[out.dtype] * magnitude
    excess = (out.double() - exact).abs() - allowed
    assert (excess <= 0).all(), f"off by {excess.max().item()} more than allowed"  # NaN fails too
