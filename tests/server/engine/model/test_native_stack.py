"""A decoder's layers in one call of the compiled module: equal bit for bit to the layers one by one, and refusals."""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lori.base_identity import module_shapes
from lori.base_model import load_base_model
from lori.basis import Seeded
from lori.kernels import Route, Term, Weight
from lori.kernels.cpu import bound_operands, bound_route
from lori.packed_adapter import pack_adapter
from lori.pool import AdapterPool
from lori.projection import NativeProjection
from server.engine.model.decoder import Span
from server.engine.model.native_ops import NativeOps, NativeStack, products
from server.engine.model.runner import Runner
from server.engine.request import Chunk, Request
from server.engine.request import Sequence as EngineSequence
from tests.lori.adapters import make_adapter
from tests.server.engine.model.test_runner import SERVED
from tests.server.rig import ALL_LINEAR
from tests.tiny import save_tiny_model

BF16 = torch.bfloat16
pytestmark = pytest.mark.needs("kernels")
KNOWN = sorted(SERVED.keys() - {"llama with heads of 12"})
IDS = tuple(range(40, 110))
CUTS = (0, 3, 60, 61, 62, 70)
"""Bounds of the chunks: a prompt in parts, one of them long, and steps of one token."""
TERMS: Sequence[Sequence[tuple[int, Weight]]] = [(), ((0, 1.0),), ((0, (0.5, -1.0)), (2, -2.0)), ((1, 1.0),)]
"""Terms of each sequence: the base, one adapter, a sum of two with weights by layer, and an adapter on another basis."""
NUM_BLOCKS = 8


@pytest.fixture(autouse=True)
def num_threads() -> Iterator[Callable[[int], None]]:
    """Run with one thread. Yield the function that sets another number for one test."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def runner_of(folder: Path, name: str) -> Runner:
    """Return a runner in bf16 with three adapters in its slots."""
    model = load_base_model(str(save_tiny_model(folder, SERVED[name]())), BF16, attention="eager").model
    shapes, bases = module_shapes(model), [Seeded(seed=3), Seeded(seed=3, stream=7)]
    adapters = [
        make_adapter("wide", shapes, ALL_LINEAR, 8, 16.0, bases[0], seed=1),
        make_adapter("narrow", shapes, ("q_proj", "up_proj"), 3, 4.5, bases[1], seed=2),
        make_adapter("shared", shapes, ("down_proj", "o_proj"), 5, 5.0, bases[0], seed=3),
    ]
    pool = AdapterPool(shapes, bases, 8, len(adapters), BF16)
    for slot, adapter in enumerate(adapters):
        pool.put(slot, pack_adapter(adapter, pool.layouts))
    return Runner(model, pool, NUM_BLOCKS * len(TERMS), 16)


def sequences() -> list[EngineSequence]:
    request = Request(id="x", prompt_text="", prompt_ids=IDS, prompt_offsets=(0,) * len(IDS), max_tokens=0)
    made = [EngineSequence(request, blocks=[*range(i * NUM_BLOCKS, (i + 1) * NUM_BLOCKS)]) for i in range(len(TERMS))]
    for sequence, terms in zip(made, TERMS, strict=True):
        sequence.terms = [*terms]
    return made


def steps(batch: Sequence[EngineSequence]) -> Iterator[list[Chunk]]:
    """Yield steps that mix sequences of one token with longer ones."""
    parts = [[Chunk(s, i, j) for i, j in pairwise(CUTS)] for s in batch]
    for number, late in enumerate(parts[3]):
        early = [part[number] for part in parts[:3]]
        yield sorted([*early, late], key=lambda chunk: chunk.stop - chunk.start > 1)


def logits(runner: Runner) -> list[torch.Tensor]:
    """Return the logits of all tokens of every step."""
    return [runner.forward(chunks, range(sum(c.stop - c.start for c in chunks))) for chunks in steps(sequences())]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", KNOWN)
def test_all_layers_in_one_call_equal_the_layers_one_by_one(
    name: str, threads: int, tmp_path: Path, num_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_threads(threads)
    runner = runner_of(tmp_path, name)
    assert isinstance(runner._ops, NativeStack)
    actual = logits(runner)
    monkeypatch.setattr(NativeStack, "run", NativeOps.run)
    expected = logits(runner)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert expected[0].isfinite().all()


@pytest.mark.parametrize("run", [NativeStack.run, NativeOps.run])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", KNOWN)
def test_rows_whose_logits_are_needed_do_not_depend_on_the_others(
    run: Callable[..., object],
    name: str,
    threads: int,
    tmp_path: Path,
    num_threads: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_threads(threads)
    monkeypatch.setattr(NativeStack, "run", run)
    runner = runner_of(tmp_path, name)
    for all_logits, chunks in zip(logits(runner), steps(sequences()), strict=True):
        ends = [*accumulate(chunk.stop - chunk.start for chunk in chunks)]
        for rows in ([end - 1 for end in ends], [ends[-1] - 1, 0, 0], [ends[0]], []):
            assert torch.equal(runner.forward(chunks, rows), all_logits[rows])


def test_the_last_layer_computes_only_the_rows_whose_logits_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NativeStack, "run", NativeOps.run)
    runner, counts, call = runner_of(tmp_path, "llama"), dict[int, int](), NativeProjection.__call__

    def count(product: NativeProjection, x: torch.Tensor, route: Route | None) -> torch.Tensor:
        counts[id(product)] = len(x)
        return call(product, x, route)

    monkeypatch.setattr(NativeProjection, "__call__", count)
    chunks = next(steps(sequences()))
    runner.forward(chunks, [0, 4])
    num_tokens = sum(chunk.stop - chunk.start for chunk in chunks)
    first, *_, last = ([counts[id(product)] for product in products(layer)] for layer in runner.decoder.layers)
    assert first == [num_tokens] * 4
    assert last == [num_tokens, 2, 2, 2]


def test_adapters_change_the_logits(tmp_path: Path) -> None:
    (first, *_) = logits(runner_of(tmp_path, "llama"))
    base, one, merged, other = (first[row * CUTS[1] : (row + 1) * CUTS[1]] for row in range(4))
    assert all(not torch.equal(base, row) for row in (one, merged, other))


def test_arguments_that_belong_to_other_layers_are_refused(tmp_path: Path) -> None:
    stack = stack_of(runner_of(tmp_path, "llama"))
    x = torch.zeros(1, 48, dtype=BF16)
    rotary, num_layers = [(0, 0)], stack._num_layers
    step, elsewhere = (stack.plan([Span(0, 1, 0, [block])]) for block in (0, NUM_BLOCKS * len(TERMS)))
    with pytest.raises(ValueError, match="another memory"):
        stack._stack.forward(x.data_ptr(), x.data_ptr(), elsewhere, rotary, [], [], 1)
    with pytest.raises(ValueError, match="RoPE is missing"):
        stack._stack.forward(x.data_ptr(), x.data_ptr(), step, [], [], [], 1)
    operands = [bound_operands(layer_operands) for layer_operands in stack._operands]
    with pytest.raises(ValueError, match="or none without a route"):
        stack._stack.forward(x.data_ptr(), x.data_ptr(), step, rotary, [], operands, 1)
    route = bound_route(Route.from_terms([Term(0, 1, 3, 1.0)], 1))
    with pytest.raises(ValueError, match="a slot that the operands do not have"):
        stack._stack.forward(x.data_ptr(), x.data_ptr(), step, rotary, [route] * num_layers, operands, 1)
    with pytest.raises(ValueError, match="a route for each layer"):
        stack._stack.forward(x.data_ptr(), x.data_ptr(), step, rotary, [route], operands, 1)
    with pytest.raises(ValueError, match="a layer's route is missing"):
        stack._stack.forward(x.data_ptr(), x.data_ptr(), step, rotary, [None] * num_layers, operands, 1)
    with pytest.raises(ValueError, match="not of this layer"):
        stack._stack.forward(x.data_ptr(), x.data_ptr(), step, rotary, [route] * num_layers, operands[::-1], 1)
    for rows in ([1], [-1], [0, 0]):
        with pytest.raises(ValueError, match="ascending rows"):
            stack._stack.forward(x.data_ptr(), x.data_ptr(), step, rotary, [], [], 1, np.array(rows, np.int32))
    row, good = np.array([0], np.int32), bound_route(Route.from_terms([Term(0, 1, 0, 1.0)], 1))
    with pytest.raises(ValueError, match="and no rows"):
        stack._stack.forward(x.data_ptr(), x.data_ptr(), step, rotary, [good] * num_layers, operands, 1, None, good)
    with pytest.raises(ValueError, match="none of the step"):
        stack._stack.forward(x.data_ptr(), x.data_ptr(), step, rotary, [], [], 1, row, good)
    longer = bound_route(Route.from_terms([Term(0, 2, 0, 1.0)], 2))
    with pytest.raises(ValueError, match="a route of these tokens"):
        stack._stack.forward(x.data_ptr(), x.data_ptr(), step, rotary, [good] * num_layers, operands, 1, row, longer)


def stack_of(runner: Runner) -> Any:
    assert isinstance(runner._ops, NativeStack)
    return runner._ops
