"""Ops in C++: bits that neither chunks nor threads change, and refusals before anything is written."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch

from lori.native import MODULE
from server.engine.model.decoder import Heads, Norm, Span
from server.engine.model.native_ops import NativeOps
from tests.server.engine.model.attended import FP32, HEADS, NATIVE, Rig, each_dtype, heads_of, rotary_at, weights

pytestmark = pytest.mark.usefixtures("mended_interpreter", "num_threads")
needs_native = pytest.mark.needs("kernels")


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
