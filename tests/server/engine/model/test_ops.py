"""Norm, gate and attention beside a layer's products: in C++ and in torch, against sums in fp64.

Allowed errors are relative to the magnitudes that went into a sum: the values that a token weighs, |gated| * |up|, the norm.
Keys and values lie in memory that was full of NaN or infinities: a sequence may read only what it wrote itself.
Shapes: T tokens of a step, L keys, H heads, G key-value heads, E head size, D width.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch

from lori.kernels.native import MODULE, instruction_sets
from server.engine.model import triton_ops
from server.engine.model.decoder import Heads, Norm, Ops, Rotary, Span
from server.engine.model.native_ops import NativeOps
from server.engine.model.torch_ops import TorchOps
from server.engine.model.triton_ops import GpuOps
from tests.cases import all_pairs
from tests.interpreter import INTERPRETED, mend

BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = [FP32, BF16]
CPU = torch.device("cpu")
ROUNDING = {FP32: 2.0**-24, BF16: 2.0**-8}
POISON = (float("nan"), float("inf"), 3e38)
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
needs_native = pytest.mark.needs("kernels")
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def each_case(names: str, *axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize by every pair of values of two axes, called `names`, and of an implementation and its dtype."""
    cases = [(*values, dtype, implementation) for *values, (implementation, dtype) in all_pairs(*axes, CODE)]
    marks = [INTERPRETED if implementation == "triton" else () for *_, implementation in cases]
    params = [pytest.param(*case, marks=mark) for case, mark in zip(cases, marks, strict=True)]
    return pytest.mark.parametrize(f"{names},dtype,implementation", params)


@pytest.fixture(autouse=True)
def mended_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton interprets, which takes long: keys are split in fewer parts. A device does not warn of infinity less infinity."""
    mend(monkeypatch)
    monkeypatch.setattr(triton_ops, "PROGRAMS", 8)
    with np.errstate(invalid="ignore"):
        yield


@pytest.fixture(autouse=True)
def num_threads() -> Iterator[Callable[[int], None]]:
    """One thread, and what sets another number for one test."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def weights(size: int, seed: int = 0) -> torch.Tensor:
    """Return the weight of a norm (E,)."""
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) * 3 - 1


# --- norm


@each_case("sizes,is_added", [(1, 16), (3, 48), (65, 96), (5, 4096), (130, 576)], [False, True])
def test_norm(sizes: tuple[int, int], is_added: bool, dtype: torch.dtype, implementation: str) -> None:
    num_rows, size = sizes
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
    torch.testing.assert_close(out[2], torch.ones_like(out[2]), rtol=1e-6, atol=0)
    assert out[3].isnan().all()
    torch.testing.assert_close(out[4], stream[4], rtol=1e-5, atol=0)


# --- gate

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "gelu": lambda x: 0.5 * x * torch.erfc(-x * 0.5**0.5),
}


@each_case("sizes,activation", [(1, 16), (3, 48), (33, 80), (2, 4096)], list(ACTIVATIONS))
def test_gate(sizes: tuple[int, int], activation: str, dtype: torch.dtype, implementation: str) -> None:
    num_rows, size = sizes
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
def test_nan_passes_the_gate_in_its_own_column_alone(activation: str, dtype: torch.dtype, implementation: str) -> None:
    x = torch.ones(2, 64, dtype=dtype)
    x[0, 3] = x[1, 32 + 5] = torch.nan
    out = make_ops(implementation, [HEADS], 1, 16, dtype).gate(x, activation)
    assert out.isnan().nonzero().tolist() == [[0, 3], [1, 5]]


# --- attention: what a step is, and the exact sum that it must equal


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


# --- attention

CHUNKS: tuple[tuple[int, ...], ...] = (
    (15, 1, 1, 15, 17), (16, 16, 1), (1, 1, 1, 30), (47, 2, 48), (33, 30, 33), (1,) * 18,
)  # fmt: skip


@each_case("group,head_size", [1, 3, 7, 8, 16], [16, 48, 64, 80, 96, 128, 256, 512])
def test_heads_of_every_size_and_number(group: int, head_size: int, dtype: torch.dtype, implementation: str) -> None:
    rig = Rig.of(implementation, heads_of(2 * group, 2, head_size), dtype)
    rig.check(("a", 21))
    rig.check(("a", 1), ("b", 14))
    rig.check(("a", 1), ("b", 1))
    rig.check(("b", 1), ("a", 4), ("c", 3))


@each_implementation
@each_dtype
@pytest.mark.parametrize("num_heads", [1, 5, 12, 13, 24, 25])
def test_one_head_of_keys_for_all(num_heads: int, dtype: torch.dtype, implementation: str) -> None:
    rig = Rig.of(implementation, heads_of(num_heads, 1, 32), dtype)
    rig.check(("a", 18))
    rig.check(("a", 1))


@each_case("group,window", [1, 3, 16], [1, 2, 8, 15, 16, 17, 33, 1000])
def test_a_window(group: int, window: int, dtype: torch.dtype, implementation: str) -> None:
    rig = Rig.of(implementation, heads_of(group, 1, 32, window=window), dtype)
    rig.check(("a", 7))
    rig.check(("a", 50))
    rig.check(("a", 1), ("b", 40))
    rig.check(("a", 1), ("b", 1))
    rig.check(("b", 1), ("a", 23))


@each_implementation
@each_dtype
def test_a_window_of_one_is_the_token_s_own_value(dtype: torch.dtype, implementation: str) -> None:
    rig = Rig.of(implementation, heads_of(3, 1, 32, window=1), dtype)
    for work in (("a", 20), ("a", 1), ("a", 30)):
        out = rig.run(work)
        own = torch.stack(rig.histories["a"].values[-work[1] :])
        torch.testing.assert_close(out, own.expand(-1, 3, -1).flatten(1), rtol=1e-6, atol=0)


@each_implementation
@each_dtype
@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
def test_a_softcap(softcap: float, window: int, dtype: torch.dtype, implementation: str) -> None:
    rig = Rig.of(implementation, heads_of(4, 2, 32, window=window, softcap=softcap), dtype)
    rig.check(("a", 20))
    rig.check(("a", 1), ("b", 17))
    rig.check(("a", 1), ("b", 1))


@each_implementation
@each_dtype
@pytest.mark.parametrize("which", ["both", "queries", "keys"])
def test_queries_and_keys_are_normalised(which: str, dtype: torch.dtype, implementation: str) -> None:
    query, key = (Norm(weight=weights(48, seed), epsilon=0.5) for seed in (1, 2))
    heads = heads_of(
        4, 2, 48, query_norm=None if which == "keys" else query, key_norm=None if which == "queries" else key, scale=0.2
    )
    rig = Rig.of(implementation, heads, dtype)
    rig.check(("a", 20))
    rig.check(("a", 1), ("b", 17))
    rig.check(("a", 1), ("b", 1))


@each_case("chunks,block_size", CHUNKS, [16, 32, 48])
def test_chunk_after_chunk_over_the_borders_of_blocks(
    chunks: Sequence[int], block_size: int, dtype: torch.dtype, implementation: str
) -> None:
    rig = Rig.of(implementation, heads_of(6, 2, 32), dtype, block_size)
    for chunk in chunks:
        rig.check(("a", chunk))


@each_implementation
@each_dtype
@pytest.mark.parametrize("block_size", [16, 48])
def test_many_sequences_in_one_step(block_size: int, dtype: torch.dtype, implementation: str) -> None:
    rig = Rig.of(implementation, heads_of(6, 2, 32, window=20), dtype, block_size, 40)
    rig.check(*((name, size) for name, size in zip("abcdefg", (16, 15, 17, 2, 31, 33, 5), strict=True)))
    rig.check(*((name, 1) for name in "abcd"), ("e", 2), ("f", 40), ("h", 1), ("g", 3))
    rig.check(*((name, 1) for name in "hgfedcba"))


@each_implementation
@pytest.mark.parametrize("seed", range(6))
def test_any_steps(seed: int, implementation: str) -> None:
    rng = random.Random(seed)
    num_kv_heads, window, softcap = rng.choice([1, 2, 3]), rng.choice([0, 0, 5, 30]), rng.choice([0.0, 0.0, 10.0])
    heads = heads_of(num_kv_heads * rng.randint(1, 13), num_kv_heads, 16 * rng.randint(1, 6), window=window, softcap=softcap)
    rig = Rig.of(implementation, heads, rng.choice(DTYPES), rng.choice([16, 32, 48]), 60)
    for _ in range(8):
        names = rng.sample("abcdef", rng.randint(1, 5))
        work = [(name, rng.choice([1, 1, 2, 13, 16, 25])) for name in names]
        rig.check(*sorted(work, key=lambda item: item[1] > 1))


@pytest.mark.slow
@each_implementation
@each_dtype
def test_five_thousand_keys(dtype: torch.dtype, implementation: str) -> None:
    rig = Rig.of(implementation, heads_of(4, 2, 32), dtype, 16, 330)
    while len(rig.histories.get("a", History([])).keys) < 5000:
        rig.run(("a", 500))
    rig.check(("a", 1))
    rig.check(("a", 3))
    rig.check(("a", 1))


@each_implementation
@each_dtype
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_scores_that_are_far_apart(softcap: float, dtype: torch.dtype, implementation: str) -> None:
    heads = heads_of(1, 1, 16, scale=1000.0, softcap=softcap)
    rig = Rig.of(implementation, heads, dtype)
    for count in (20, 1, 17):
        spans, qkv, _ = rig.plan([("a", count)])
        rotary = torch.ones(count, 16), torch.zeros(count, 16)
        qkv[:, :32] = qkv[:, :32].sign()  # so that scores are whole thousands
        query = rig.remember([("a", count)], spans, qkv, rotary)
        exact, magnitude = attend_exactly(query, rig.histories["a"], spans[0].position, heads)
        out = rig.ops.attend(qkv, 0, heads, rotary, rig.ops.plan(spans))
        assert_attended(out, exact.flatten(1), magnitude.flatten(1), implementation)


@each_implementation
def test_layers_have_memory_of_their_own(implementation: str) -> None:
    heads = [heads_of(4, 2, 32), heads_of(4, 2, 32, window=5)]
    ops = make_ops(implementation, heads, 24, 16, FP32)
    fill(ops, FP32, torch.nan)
    rigs = [
        Rig(ops, layer_heads, 16, FP32, list(range(24)), implementation, layer=i, num_steps=9 * i)
        for i, layer_heads in enumerate(heads)
    ]
    for work in ([("a", 20)], [("a", 1), ("b", 3)], [("b", 1), ("a", 20)]):
        for rig in rigs:
            rig.check(*work)


@pytest.mark.parametrize("implementation", ["torch", *NATIVE[:1]])
@each_dtype
def test_the_memory_is_as_large_as_it_says(dtype: torch.dtype, implementation: str) -> None:
    ops: Any = make_ops(implementation, [heads_of(4, 2, 32)] * 3, 5, 48, dtype)
    assert ops.num_bytes == 3 * 5 * 48 * 2 * 2 * 32 * dtype.itemsize
    assert sum(memory.nbytes for memory in ops._memory) == ops.num_bytes


# --- memory that others have written


STEPS: tuple[tuple[Work, ...], ...] = (
    (("a", 20),), (("a", 1), ("b", 17)), (("a", 1), ("b", 1)), (("b", 1), ("a", 30)), (("c", 1),), (("c", 1), ("d", 49)),
)  # fmt: skip


@each_case("poison,layout", POISON, [(16, 0), (16, 7), (48, 7), (48, 0)])
def test_earlier_content_of_the_memory_changes_no_bit(
    poison: float, layout: tuple[int, int], dtype: torch.dtype, implementation: str
) -> None:
    block_size, window = layout
    heads = heads_of(6, 2, 32, window=window)
    clean, poisoned = (Rig.of(implementation, heads, dtype, block_size, poison=value) for value in (0.0, poison))
    for work in STEPS:
        assert torch.equal(clean.run(*work), poisoned.run(*work))


@each_implementation
@each_dtype
def test_blocks_of_a_sequence_that_has_ended_are_as_fresh_ones(dtype: torch.dtype, implementation: str) -> None:
    rig = Rig.of(implementation, heads_of(6, 2, 32), dtype, num_blocks=3)
    spans, qkv, rotary = rig.plan([("ended", 48)])
    assert not rig.ops.attend(qkv.fill_(torch.inf), 0, rig.heads, rotary, rig.ops.plan(spans)).isfinite().any()
    rig.free = rig.histories.pop("ended").blocks[::-1]
    for count in (1, 20, 1, 9, 17):
        rig.check(("next", count))


@each_implementation
@each_dtype
def test_infinities_and_nan_stay_with_their_sequence(dtype: torch.dtype, implementation: str) -> None:
    ill, well = (Rig.of(implementation, heads_of(6, 2, 32), dtype) for _ in range(2))
    for work in ((("a", 5), ("b", 20), ("c", 7)), (("b", 1), ("a", 1), ("c", 1))):
        spans, qkv, rotary = ill.plan(work)
        span = next(span for span, (name, _) in zip(spans, work, strict=True) if name == "b")
        of_b = slice(span.row, span.row + span.num_tokens)
        ill.remember(work, spans, qkv, rotary)
        qkv[of_b] = torch.nan
        out, expected = ill.ops.attend(qkv, 0, ill.heads, rotary, ill.ops.plan(spans)), well.run(*work)
        assert out[of_b].isnan().all()
        others = torch.ones(len(out), dtype=torch.bool)
        others[of_b] = False
        assert torch.equal(out[others], expected[others])


@each_implementation
@each_dtype
@pytest.mark.parametrize("block_size", [16, 32])
def test_sequences_that_share_the_blocks_of_a_prefix(block_size: int, dtype: torch.dtype, implementation: str) -> None:
    rig = Rig.of(implementation, heads_of(6, 2, 32), dtype, block_size)
    rig.check(("a", 2 * block_size + 5))
    a, shared = rig.histories["a"], 2 * block_size
    for name in "bc":
        rig.histories[name] = History(a.blocks[:2], a.keys[:shared], a.values[:shared])
    rig.check(("b", 1), ("c", 18))
    rig.check(("a", 1), ("b", 1), ("c", 1))
    rig.check(("c", 1), ("a", 20), ("b", 20))


# --- bits


@pytest.mark.parametrize("implementation", NATIVE)
@each_dtype
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("sizes", [(6, 2, 48), (16, 1, 16), (2, 2, 80), (14, 2, 64)])
def test_chunks_and_the_other_sequences_of_a_step_change_no_bit(
    sizes: tuple[int, int, int], window: int, dtype: torch.dtype, implementation: str
) -> None:
    heads, cuts = heads_of(*sizes, window=window), (0, 1, 16, 30, 31, 32, 70)
    whole, cut = (Rig.of(implementation, heads, dtype) for _ in range(2))
    spans, qkv, rotary = whole.plan([("a", 70)])
    together = whole.ops.attend(qkv.clone(), 0, heads, rotary, whole.ops.plan(spans))
    for start, stop in pairwise(cuts):
        (other, span), others, _ = cut.plan([("b", 3), ("a", stop - start)])
        cut.remember([("b", 3), ("a", stop - start)], [other, span], others, rotary_at(range(3 + stop - start), sizes[2]))
        others[3:] = qkv[start:stop]
        both = rotary_at([*range(other.position, other.position + 3), *range(start, stop)], sizes[2])
        out = cut.ops.attend(others, 0, heads, both, cut.ops.plan([other, span]))
        assert torch.equal(out[3:], together[start:stop])


@pytest.mark.parametrize("implementation", NATIVE)
@each_dtype
def test_threads_give_the_same_bits(dtype: torch.dtype, implementation: str, num_threads: Callable[[int], None]) -> None:
    work = ((("a", 70),), (("a", 1), ("b", 95), ("c", 9)), tuple((name, 1) for name in "abcdefghijklmnopqrstuvwxyz0123456789"))
    norm = Norm(weight=weights(64), epsilon=1e-6)
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    outputs = []
    for threads in (1, 2, 3, 2, 3, 2, 3):
        num_threads(threads)
        rig = Rig.of(implementation, heads_of(6, 2, 32), dtype, num_blocks=60)
        outs = [rig.run(*step) for step in work]
        outputs.append([*outs, rig.ops.norm(x.clone(), x, norm), rig.ops.gate(x, "silu")])
    for other in outputs[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs[0], other, strict=True))


# --- what is refused


@needs_native
@pytest.mark.parametrize(
    ("spans", "why"),
    [
        ([Span(1, 2, 0, [0])], "follow one another"),
        ([Span(0, 2, 0, [0]), Span(3, 1, 0, [1])], "follow one another"),
        ([Span(0, 2, 0, [0]), Span(1, 1, 0, [1])], "follow one another"),
        ([Span(0, 2, 0, [0]), Span(0, 2, 0, [1])], "follow one another"),
        ([Span(0, 0, 0, [0])], "follow one another"),
        ([Span(0, -1, 0, [0])], "follow one another"),
        ([Span(0, 1, -1, [0])], "follow one another"),
        ([Span(0, 17, 0, [0])], "their blocks lie in the table"),
        ([Span(0, 1, 16, [0])], "their blocks lie in the table"),
        ([Span(0, 2, 2**31 - 1, [0])], "their blocks lie in the table"),
        ([Span(0, 1, 0, [])], "their blocks lie in the table"),
        ([Span(0, 1, 0, [-1])], "a block is negative"),
    ],
)
def test_spans_that_do_not_follow_one_another_or_lack_blocks_are_refused(spans: Sequence[Span], why: str) -> None:
    ops = NativeOps([HEADS], 4, 16, FP32)
    with pytest.raises(ValueError, match=why):
        ops.plan(spans)


@needs_native
@pytest.mark.parametrize(("block_size", "beyond"), [(16, 4), (16, 2**27 - 1), (48, 4)])
def test_a_block_beyond_the_memory_is_refused_and_nothing_is_written(block_size: int, beyond: int) -> None:
    ops = NativeOps([HEADS], 4, block_size, FP32)
    qkv = torch.ones(2, 8 * 32)
    before = qkv.clone()
    step = ops.plan([Span(0, 1, 0, [3]), Span(1, 1, 0, [beyond])])
    with pytest.raises(ValueError, match="of another memory"):
        ops.attend(qkv, 0, HEADS, rotary_at([0, 0], 32), step)
    assert torch.equal(qkv, before)
    assert ops._memory[0].eq(0).all()


@needs_native
def test_a_step_for_other_heads_is_refused() -> None:
    ops, other = NativeOps([HEADS], 4, 16, FP32), NativeOps([heads_of(8, 2, 32)], 4, 16, FP32)
    step = other.plan([Span(0, 1, 0, [3])])
    with pytest.raises(ValueError, match="of another memory"):
        ops.attend(torch.ones(1, 8 * 32), 0, HEADS, rotary_at([0], 32), step)


@needs_native
@pytest.mark.parametrize("head_size", [0, 1, 8, 24, 40, 100, 528, 1024])
def test_heads_of_another_size_than_16s_are_refused(head_size: int) -> None:
    with pytest.raises(ValueError, match="heads of 16 to 512 values, in 16s"):
        NativeOps([Heads(num_heads=2, num_kv_heads=1, head_size=head_size, scale=1.0)], 4, 16, FP32)


@needs_native
def test_heads_and_norms_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="a multiple of the key-value heads"):
        NativeOps([heads_of(5, 2, 32)], 4, 16, FP32)
    with pytest.raises(ValueError, match="a multiple of the key-value heads"):
        NativeOps([heads_of(5, 0, 32)], 4, 16, FP32)
    with pytest.raises(ValueError, match="a norm is not of a head's size"):
        NativeOps([heads_of(4, 2, 32, key_norm=Norm(weight=torch.ones(16), epsilon=0.0))], 4, 16, FP32)


@needs_native
def test_dtypes_and_instruction_sets_that_there_are_not_are_refused() -> None:
    with pytest.raises(ValueError, match="dtype float16, expected bfloat16 or float32"):
        NativeOps([HEADS], 4, 16, torch.float16)
    with pytest.raises(ValueError, match="does not run mmx"):
        MODULE.Layers("mmx", "float32")
