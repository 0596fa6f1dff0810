"""The random numbers behind the draws."""

import numpy as np
import pytest

from server.engine.sampling.sampler import NUM_AHEAD, RandomStream, uniform_numbers

SEEDS = (0, 1, 2**31, 2**62, 2**63 - 1)


def numpy_number(seed: int, choice: int, position: int) -> float:
    word = int(np.random.Philox(key=seed + choice * 2**64, counter=position).random_raw())
    return (word >> 11) / 2**53


def test_the_numbers_are_the_same_in_every_version() -> None:
    """A seed in a reply gives the same tokens in every version of this server."""
    numbers = [RandomStream(0).at(0), RandomStream(0).at(1), RandomStream(2**62).at(5)]
    assert numbers == [0.011546754286331562, 0.5023796042735054, 0.652083168624115]
    assert uniform_numbers(0, 0, 0, 4) == [0.011546754286331562, 0.5023796042735054, 0.25382274039248487, 0.5724548284695403]
    assert uniform_numbers(7, 3, 10, 3) == [0.5981835815158014, 0.7139104988853053, 0.17242244551672536]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("choice", [0, 1, 127])
def test_each_number_belongs_to_its_counter(seed: int, choice: int) -> None:
    stream = RandomStream(seed, choice)
    num = 2 * NUM_AHEAD + 3
    assert [stream.at(i) for i in range(num)] == [numpy_number(seed, choice, i) for i in range(num)]


def test_a_number_does_not_depend_on_those_asked_for_before() -> None:
    stream = RandomStream(5, 2)
    places = [3, NUM_AHEAD + 2, 0, 1, NUM_AHEAD + 1, 2, 10**6, 3]
    assert [stream.at(place) for place in places] == [numpy_number(5, 2, place) for place in places]


def test_seeds_choices_and_positions_have_numbers_of_their_own() -> None:
    numbers = [x for seed in SEEDS for choice in range(4) for x in uniform_numbers(seed, choice, 0, 50)]
    assert len(set(numbers)) == len(SEEDS) * 4 * 50
    assert 0 <= min(numbers) < 0.01
    assert 0.99 < max(numbers) < 1
