"""Inputs of replayed decoding steps: the content of every array, independent of the steps before."""

import random

import pytest
import torch

from server.engine.model.cuda_graphs import MIN_STRIDE, TERMS, DecodingInputs, Terms, graph_sizes
from server.engine.model.decoder import Span

CPU = torch.device("cpu")
SPARE = 99
NUM_LAYERS = 3


def make(max_rows: int = 9, max_blocks: int = 40, block_size: int = 4) -> DecodingInputs:
    return DecodingInputs(max_rows, NUM_LAYERS, max_blocks, block_size, SPARE, CPU)


def blocks_of(inputs: DecodingInputs, size: int, row: int, block_size: int = 4) -> list[int]:
    """Return the blocks that hold the keys of `row`, looked up as a kernel does."""
    keys = inputs.decode_keys(size)
    start, num_keys = int(keys.starts[row]), int(keys.lengths[row])
    return keys.table[start : start + -(-num_keys // block_size)].tolist()


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (1, [1]), (2, [1, 2]), (3, [1, 2, 4]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 16]), (24, [1, 2, 4, 8, 16, 24]),
        (64, [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]), (65, [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80]),
    ],
)  # fmt: skip
def test_sizes(most: int, sizes: list[int]) -> None:
    assert graph_sizes(most) == sizes
    many = graph_sizes(1000)
    assert many[-1] >= 1000
    assert len(many) < 30
    assert all(next(size for size in many if size >= rows) <= rows * 1.25 + 8 for rows in range(1, 1001))


def test_a_step_runs_at_the_smallest_size_that_holds_it() -> None:
    inputs = make(9)
    spans = [Span(i, 1, i, [i, i, i]) for i in range(17)]
    assert [inputs.size_for(spans[:n], [()] * n) for n in (1, 2, 3, 8, 9, 16, 17)] == [1, 2, 4, 8, 16, 16, None]
    assert inputs.size_for([*spans[:2], Span(2, 2, 0, [5])], [()] * 3) is None
    term = (0, 1.0)
    assert inputs.size_for(spans[:1], [[term] * TERMS]) == 1
    assert inputs.size_for(spans[:1], [[term] * (TERMS + 1)]) is None
    assert inputs.size_for(spans[:3], [[term] * (2 * TERMS), [], [term] * (2 * TERMS)]) == 4


def test_rows_are_those_of_the_step_and_padding_rows_see_one_key_of_the_spare_block() -> None:
    inputs = make()
    spans = [Span(0, 1, 6, [3, 8]), Span(1, 1, 0, [5]), Span(2, 1, 8, [1, 2, 4])]
    terms: list[Terms] = [[(7, 0.5), (2, -1.0)], [], [(1, 3.0)]]
    inputs.fill(4, [11, 12, 13], spans, terms)
    ids, positions = inputs.tokens(4)
    assert ids.tolist() == [11, 12, 13, 0]
    assert positions.tolist() == [6, 0, 8, 0]
    decoding, route = inputs.decode_keys(4), inputs.route(4)
    assert decoding.write.tolist() == [8 * 4 + 2, 5 * 4, 4 * 4, SPARE * 4]
    assert decoding.lengths.tolist() == [7, 1, 9, 1]
    assert [blocks_of(inputs, 4, row) for row in range(4)] == [[3, 8], [5], [1, 2, 4], [SPARE]]
    assert route.segments.tolist() == [[0, 1, 0, 2], [1, 2, 2, 2], [2, 3, 2, 3], [3, 4, 3, 3]]
    for layer in map(route.layer_route, range(NUM_LAYERS)):
        assert layer.spans == [(0, 1, [(7, 0.5), (2, -1.0)]), (1, 2, []), (2, 3, [(1, 3.0)]), (3, 4, [])]
        assert layer.is_by_token


def test_each_layer_has_its_weights() -> None:
    inputs = make()
    spans = [Span(0, 1, 6, [3, 8]), Span(1, 1, 0, [5])]
    inputs.fill(2, [11, 12], spans, [[(7, (0.5, 1.0, 1.5)), (2, -1.0)], [(1, (3.0, 0.0, 2.0))]])
    layers = [*map(inputs.route(2).layer_route, range(NUM_LAYERS))]
    assert [layer.spans for layer in layers] == [
        [(0, 1, [(7, first), (2, -1.0)]), (1, 2, [(1, second)])] for first, second in ((0.5, 3.0), (1.0, 0.0), (1.5, 2.0))
    ]
    assert all(layer.weights.data_ptr() % 16 == 0 for layer in layers), "else Triton compiles its kernels again"
    inputs.fill(2, [11, 12], spans, [[(7, 2.0)], [(7, 0.5)]])
    assert {tuple(layer.weights[:2].tolist()) for layer in layers} == {(2.0, 0.5)}, "each is a view of the memory, not a copy"


def test_all_arrays_have_the_same_addresses_in_every_step() -> None:
    inputs = make()
    inputs.fill(4, [1], [Span(0, 1, 0, [1])], [()])
    first, route = inputs.decode_keys(4), inputs.route(4)
    inputs.fill(4, [1], [Span(0, 1, 150, [*range(38)])], [[(1, 2.0)]])
    then, route_then = inputs.decode_keys(4), inputs.route(4)
    for name in ("starts", "lengths", "table"):
        assert getattr(first, name).data_ptr() == getattr(then, name).data_ptr()
        assert getattr(first, name).data_ptr() % 16 == 0
    for name in ("segments", "slots", "weights"):
        assert getattr(route, name).data_ptr() == getattr(route_then, name).data_ptr()
        assert getattr(route, name).data_ptr() % 16 == 0
    assert first.lengths.tolist() == [151, 1, 1, 1], "arrays that were returned before are views of the memory, not copies"


@pytest.mark.parametrize("seed", range(5))
def test_a_step_is_right_whatever_earlier_steps_left(seed: int) -> None:
    """Rows, sizes, strides and the blocks of each sequence change at random, in place."""
    rng, inputs = random.Random(seed), make()
    lists = [[rng.randrange(90) for _ in range(rng.randint(1, 3))] for _ in range(12)]
    for _ in range(150):
        for blocks in rng.sample(lists, 3):
            match rng.choice(["grow", "shrink", "replace", "wait"]):
                case "grow" if len(blocks) < 40:
                    blocks.append(rng.randrange(90))
                case "shrink":
                    del blocks[1:]
                case "replace":
                    blocks[:] = [rng.randrange(90) for _ in blocks]
        chosen = rng.sample(lists, rng.randint(1, 9))
        spans = [Span(i, 1, 4 * len(blocks) - rng.randint(1, 4), blocks) for i, blocks in enumerate(chosen)]
        terms: list[Terms] = [[(rng.randrange(50), float(rng.randrange(9))) for _ in range(rng.randint(0, 4))] for _ in chosen]
        size = inputs.size_for(spans, terms)
        assert size is not None
        inputs.fill(size, [*range(len(chosen))], spans, terms)
        assert [blocks_of(inputs, size, row) for row in range(size)] == chosen + [[SPARE]] * (size - len(chosen))
        for layer in map(inputs.route(size).layer_route, range(NUM_LAYERS)):
            assert [row_terms for _, _, row_terms in layer.spans] == terms + [[]] * (size - len(chosen))
        assert inputs.decode_keys(size).write.tolist()[: len(chosen)] == [
            blocks[span.position // 4] * 4 + span.position % 4 for blocks, span in zip(chosen, spans, strict=True)
        ]


def test_the_stride_of_the_table_is_as_large_as_the_longest_row_needs() -> None:
    inputs = make(max_blocks=1000)
    inputs.fill(1, [1], [Span(0, 1, 0, [1])], [()])
    assert inputs.decode_keys(1).starts.tolist() == [0]
    inputs.fill(2, [1, 1], [Span(0, 1, 0, [1]), Span(1, 1, 0, [1])], [(), ()])
    assert inputs.decode_keys(2).starts.tolist() == [0, MIN_STRIDE]
    inputs.fill(2, [1, 1], [Span(0, 1, 0, [1]), Span(1, 1, 0, [1] * 999)], [(), ()])
    assert inputs.decode_keys(2).starts.tolist() == [0, 1024]
