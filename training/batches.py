"""The plan of a phase: the examples of each step, and the micro-batches of a step.

All of it is decided in advance from the seed. So a resumed run, and a run with more processes, sees the same steps.
"""

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from training.data import Item

Step = list[Item]


@dataclass(frozen=True, slots=True)
class BatchSize:
    """The size of a step: `num_items` items, or if that is 0 items until they have `num_tokens` tokens."""

    num_items: int
    num_tokens: int

    def is_reached(self, step: Step) -> bool:
        """Return whether `step` is full."""
        if self.num_items:
            return len(step) == self.num_items
        return sum(map(len, step)) >= self.num_tokens


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The items of a step that one process computes at once. Each item contributes `share` times its own loss to the step's loss.

    `needs_reference`: an example of the step has a KL loss. Then every process computes the base's logits for each micro-batch,
    since FSDP needs the same number of forward passes in all processes.
    """

    items: tuple[Item, ...]
    share: float
    needs_reference: bool = False
    adapter_weight: float = 1.0
    """The weight at which the adapter is applied."""


def plan_steps(
    data: Sequence[Item],
    mix: Sequence[Item],
    mix_fraction: float,
    size: BatchSize,
    length: tuple[int, float],
    seed: int,
) -> list[Step]:
    """Return the steps of a phase. `length` is (number of steps, passes over `data`); the passes count if the steps are 0.

    Each item comes from `mix` with probability `mix_fraction`. Every item of `data` (and of `mix`) is seen once before any is
    seen again. No item is dropped, so the last step may be short.
    """
    assert data
    num_steps, num_passes = length
    num_items = max(1, round(num_passes * len(data)))
    rng = random.Random(seed)
    data_order, mix_order = shuffled_forever(len(data), rng), shuffled_forever(len(mix), rng)
    steps: list[Step] = []
    step: Step = []
    num_drawn = 0
    while len(steps) < num_steps if num_steps else num_drawn < num_items:
        if mix and rng.random() < mix_fraction:
            step.append(mix[next(mix_order)])
        else:
            step.append(data[next(data_order)])
            num_drawn += 1
        if size.is_reached(step):
            steps.append(step)
            step = []
    return [*steps, step] if step else steps


def shuffled_forever(count: int, rng: random.Random) -> Iterator[int]:
    """Yield the numbers below `count` in a random order, then all again in another order, without an end."""
    while True:
        yield from rng.sample(range(count), count)


def draw_weights(num_steps: int, low: float, high: float, seed: int) -> list[float]:
    """Return the weight at which each step applies the adapter, drawn uniformly from [low, high]."""
    rng = random.Random(seed)
    return [rng.uniform(low, high) for _ in range(num_steps)]


def split_step(step: Step, num_micro_batches: int, adapter_weight: float = 1.0) -> list[MicroBatch]:
    """Return `step` in micro-batches of about equal numbers of tokens.

    Items are assigned greedily: the longest first, each to the micro-batch with the fewest tokens. A micro-batch that would be
    empty gets one item of share 0, since each process must have something to compute.
    """
    groups: list[list[Item]] = [[] for _ in range(num_micro_batches)]
    lengths = [0] * num_micro_batches
    for item in sorted(step, key=len, reverse=True):
        least = lengths.index(min(lengths))
        groups[least].append(item)
        lengths[least] += len(item)
    shortest, needs_reference = min(step, key=len), any(example.uses_kl for item in step for example in item.examples)
    return [
        MicroBatch(tuple(group or [shortest]), 1 / len(step) if group else 0.0, needs_reference, adapter_weight)
        for group in groups
    ]


def micro_batches(
    steps: Sequence[Step], num_micro_batches: int, process: int = 0, num_processes: int = 1, weights: Iterable[float] = ()
) -> list[MicroBatch]:
    """Return the micro-batches that `process` computes, in order. Each step has `num_micro_batches` over all processes.

    `weights`: the weight at which each step applies the adapter; 1 if absent.
    """
    assert num_micro_batches % num_processes == 0
    weighted = zip(steps, itertools.chain(weights, itertools.repeat(1.0)), strict=False)
    batches = itertools.chain.from_iterable(split_step(step, num_micro_batches, weight) for step, weight in weighted)
    return list(itertools.islice(batches, process, None, num_processes))


def held_out_batches(items: Sequence[Item], num_tokens: int) -> list[MicroBatch]:
    """Return `items` in batches of about `num_tokens`, sorted by length. The shares of all items add up to 1."""
    batches = group_by_length([len(item) for item in items], num_tokens)
    return [MicroBatch(tuple(items[i] for i in indices), 1 / len(items)) for indices in batches]


def group_by_length(lengths: Sequence[int], num_tokens: int) -> Iterator[list[int]]:
    """Yield groups of indices into `lengths`, longest first. Padded to its longest, a group has at most `num_tokens` tokens."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    while order:
        count = max(1, num_tokens // lengths[order[0]])
        yield order[:count]
        order = order[count:]
