"""Attention beside a layer's products: in C++, in Triton and in torch, against sums in fp64."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from server.engine.model.decoder import Norm
from tests.server.engine.model.attended import (
    DTYPES,
    FP32,
    NATIVE,
    History,
    Rig,
    Work,
    assert_attended,
    attend_exactly,
    each_case,
    each_dtype,
    each_implementation,
    fill,
    heads_of,
    make_ops,
    weights,
)

pytestmark = pytest.mark.usefixtures("mended_interpreter", "num_threads")
POISON = (float("nan"), float("inf"), 3e38)


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
