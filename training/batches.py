"""Which examples make which step, and which part of a step: decided at once from the seed, so that a resumed run, and one of more
processes, see the same ones."""

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from training.data import Item

Step = list[Item]


@dataclass(frozen=True, slots=True)
class BatchSize:
    """When a step has enough: `num_items` of them, or where that is 0 as many as hold `num_tokens`."""

    num_items: int
    num_tokens: int

    def is_reached(self, step: Step) -> bool:
        """Return whether `step` is full."""
        if self.num_items:
            return len(step) == self.num_items
        return sum(map(len, step)) >= self.num_tokens


@dataclass(frozen=True, slots=True)
class Part:
    """What one process computes at once of a step: some of its items, each of which is `share` of the loss.

    `asks_base`: some example of the step keeps the base. All processes then ask it, since they pass through the model together.
    """

    items: tuple[Item, ...]
    share: float
    asks_base: bool = False
    weight: float = 1.0
    """At which the adapter is applied."""


def plan_steps(
    data: Sequence[Item],
    mix: Sequence[Item],
    mix_fraction: float,
    size: BatchSize,
    length: tuple[int, float],
    seed: int,
) -> list[Step]:
    """Return the steps of a phase of `length`: so many steps, or where that is 0 so many passes over `data`.

    Each item comes from `mix` with probability `mix_fraction`. Every item of a set is seen once before any is seen again.
    None is dropped: the last step may be short.
    """
    assert data
    num_steps, num_passes = length
    num_items = max(1, round(num_passes * len(data)))
    rng = random.Random(seed)
    own, other = _shuffled_forever(len(data), rng), _shuffled_forever(len(mix), rng)
    steps: list[Step] = []
    step: Step = []
    num_own = 0
    while len(steps) < num_steps if num_steps else num_own < num_items:
        if mix and rng.random() < mix_fraction:
            step.append(mix[next(other)])
        else:
            step.append(data[next(own)])
            num_own += 1
        if size.is_reached(step):
            steps.append(step)
            step = []
    return [*steps, step] if step else steps


def _shuffled_forever(count: int, rng: random.Random) -> Iterator[int]:
    while True:
        yield from rng.sample(range(count), count)


def draw_weights(num_steps: int, low: float, high: float, seed: int) -> list[float]:
    """Return the weight at which each step applies the adapter, drawn evenly between two."""
    rng = random.Random(seed)
    return [rng.uniform(low, high) for _ in range(num_steps)]


def split(step: Step, num_parts: int, weight: float = 1.0) -> list[Part]:
    """Return `step` in parts of about as many tokens: the longest item first, each to the part that has least.

    A part that would be empty has one item of no weight, since each process must have something to compute.
    """
    parts: list[list[Item]] = [[] for _ in range(num_parts)]
    lengths = [0] * num_parts
    for item in sorted(step, key=len, reverse=True):
        least = lengths.index(min(lengths))
        parts[least].append(item)
        lengths[least] += len(item)
    shortest, asks_base = min(step, key=len), any(example.keeps_base for item in step for example in item.examples)
    return [Part(tuple(part or [shortest]), 1 / len(step) if part else 0.0, asks_base, weight) for part in parts]


def parts_of(
    steps: Sequence[Step], num_parts: int, process: int = 0, num_processes: int = 1, weights: Iterable[float] = ()
) -> list[Part]:
    """Return the parts that one of `num_processes` computes, in order: every step has `num_parts` of them in all.

    `weights`: at which each step applies the adapter; 1 where there is none.
    """
    assert num_parts % num_processes == 0
    weighted = zip(steps, itertools.chain(weights, itertools.repeat(1.0)), strict=False)
    every = itertools.chain.from_iterable(split(step, num_parts, weight) for step, weight in weighted)
    return list(itertools.islice(every, process, None, num_processes))


def held_out_parts(items: Sequence[Item], num_tokens: int) -> list[Part]:
    """Return `items` in parts of about `num_tokens`, like lengths together; their shares add up to 1."""
    places = like_lengths([len(item) for item in items], num_tokens)
    return [Part(tuple(items[i] for i in some), 1 / len(items)) for some in places]


def like_lengths(lengths: Sequence[int], num_tokens: int) -> Iterator[list[int]]:
    """Yield places in `lengths`, longest first, so many that, each padded to the longest, they have `num_tokens` at most."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    while order:
        count = max(1, num_tokens // lengths[order[0]])
        yield order[:count]
        order = order[count:]
