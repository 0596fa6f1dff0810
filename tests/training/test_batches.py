"""Planning the batches of a phase."""

from collections import Counter

from training.batches import plan_batches
from training.data import Example


def examples(count: int, length: int, first: int) -> list[Example]:
    return [Example((first + i,) * length, 1) for i in range(count)]


def test_every_example_is_seen_once_an_epoch_and_none_is_dropped() -> None:
    data = examples(103, 7, 0)
    batches = plan_batches(data, [], 0.5, 64, num_examples=2 * len(data), num_steps=None, seed=3)
    seen = Counter(example.ids[0] for batch in batches for example in batch)
    assert seen == dict.fromkeys(range(103), 2)
    assert all(64 <= sum(map(len, batch)) < 64 + 7 for batch in batches[:-1])


def test_steps_decide_how_many_batches_there_are() -> None:
    assert len(plan_batches(examples(3, 10, 0), [], 0.0, 35, num_examples=None, num_steps=17, seed=0)) == 17


def test_the_mix_has_its_share() -> None:
    batches = plan_batches(examples(50, 5, 0), examples(50, 5, 1000), 0.25, 500, num_examples=4000, num_steps=None, seed=0)
    mixed = [example.ids[0] >= 1000 for batch in batches for example in batch]
    assert mixed.count(False) == 4000
    assert 0.22 < sum(mixed) / len(mixed) < 0.28


def test_the_seed_decides_the_order() -> None:
    data = examples(40, 5, 0)
    first, again, other = (plan_batches(data, data, 0.5, 50, num_examples=None, num_steps=9, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first != other
