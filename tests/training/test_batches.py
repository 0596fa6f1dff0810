"""Planning of a phase's steps and micro-batches."""

import itertools
from collections import Counter

import pytest

from training.batches import BatchSize, draw_weights, held_out_batches, micro_batches, plan_steps, split_step
from training.data import Example, Item, Pair


def examples(count: int, length: int, first: int = 0) -> list[Item]:
    return [Example((first + i,) * length, 1) for i in range(count)]


@pytest.mark.parametrize("size", [BatchSize(0, 64), BatchSize(9, 1)])
def test_every_example_is_seen_once_an_epoch_and_none_is_dropped(size: BatchSize) -> None:
    steps = plan_steps(examples(103, 7), [], 0.5, size, (0, 2.0), seed=3)
    assert Counter(e.ids[0] for step in steps for item in step for e in item.examples) == dict.fromkeys(range(103), 2)
    for step in steps[:-1]:
        assert len(step) == 9 if size.num_items else 64 <= sum(map(len, step)) < 64 + 7


def test_a_tenth_of_an_epoch_sees_a_tenth_of_the_data() -> None:
    steps = plan_steps(examples(100, 5), [], 0.0, BatchSize(4, 1), (0, 0.1), seed=0)
    assert [len(step) for step in steps] == [4, 4, 2]


def test_a_number_of_steps_overrides_the_epochs() -> None:
    assert len(plan_steps(examples(3, 10), [], 0.0, BatchSize(0, 35), (17, 1.0), seed=0)) == 17


def test_the_mix_has_its_share() -> None:
    steps = plan_steps(examples(50, 5), examples(50, 5, 1000), 0.25, BatchSize(0, 500), (0, 80.0), seed=0)
    mixed = [e.ids[0] >= 1000 for step in steps for item in step for e in item.examples]
    assert mixed.count(False) == 4000
    assert 0.22 < sum(mixed) / len(mixed) < 0.28


def test_the_seed_decides_the_order() -> None:
    data = examples(40, 5)
    first, repeated, with_other_seed = (plan_steps(data, data, 0.5, BatchSize(0, 50), (9, 1.0), seed=s) for s in (1, 1, 2))
    assert first == repeated
    assert first != with_other_seed


@pytest.mark.parametrize("num_micro_batches", [1, 2, 3, 8])
def test_parts_are_a_step_s_examples_with_shares_that_add_up_to_one(num_micro_batches: int) -> None:
    step: list[Item] = [Example((i,) * length, 1) for i, length in enumerate([40, 3, 17, 5, 9])]
    batches = split_step(step, num_micro_batches)
    assert len(batches) == num_micro_batches
    assert sum(batch.share * len(batch.items) for batch in batches) == pytest.approx(1.0)
    assert sorted(e.ids[0] for batch in batches if batch.share for item in batch.items for e in item.examples) == [0, 1, 2, 3, 4]
    if num_micro_batches == 2:
        assert sorted(sum(map(len, batch.items)) for batch in batches) == [34, 40]


def test_several_processes_share_the_micro_batches_of_one() -> None:
    steps = plan_steps(examples(40, 5), [], 0.0, BatchSize(7, 1), (0, 1.0), seed=0)
    one_process = micro_batches(steps, 4)
    first, second = (micro_batches(steps, 4, process, 2) for process in (0, 1))
    assert [*itertools.chain.from_iterable(zip(first, second, strict=True))] == one_process


def test_all_parts_of_a_step_have_its_adapter_weight_in_every_process() -> None:
    steps = plan_steps(examples(40, 5), [], 0.0, BatchSize(7, 1), (0, 1.0), seed=0)
    weights = draw_weights(len(steps), 0.3, 0.9, seed=2)
    assert weights == draw_weights(len(steps), 0.3, 0.9, seed=2)
    assert len(set(weights)) == len(steps)
    assert 0.3 <= min(weights) < max(weights) <= 0.9
    first, second = (micro_batches(steps, 2, process, 2, weights) for process in (0, 1))
    assert [batch.adapter_weight for batch in first] == [batch.adapter_weight for batch in second] == weights
    assert {batch.adapter_weight for batch in micro_batches(steps, 2)} == {1.0}


def test_no_held_out_example_is_dropped_and_each_weighs_the_same() -> None:
    data: list[Item] = [Example((i,) * length, 1) for i, length in enumerate([9, 30, 4, 11, 2, 6])]
    batches = held_out_batches(data, 20)
    assert sorted(e.ids[0] for batch in batches for item in batch.items for e in item.examples) == [0, 1, 2, 3, 4, 5]
    assert {batch.share for batch in batches} == {1 / 6}
    assert held_out_batches([], 20) == []


def test_a_pair_is_one_item_and_stays_together() -> None:
    pairs: list[Item] = [Pair(Example((i,) * 5, 2), Example((i,) * 9, 2)) for i in range(10)]
    steps = plan_steps(pairs, [], 0.0, BatchSize(0, 40), (0, 1.0), seed=0)
    assert sum(map(len, steps)) == 10
    for batch in micro_batches(steps, 2):
        assert all(isinstance(item, Pair) for item in batch.items)
