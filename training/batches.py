"""Which examples make which step: decided at once from the seed, so that a resumed run sees the same ones."""

import itertools
import random
from collections.abc import Iterator, Sequence

from training.data import Example


def _shuffled_forever(count: int, rng: random.Random) -> Iterator[int]:
    while True:
        yield from rng.sample(range(count), count)


def plan_batches(
    data: Sequence[Example],
    mix: Sequence[Example],
    mix_fraction: float,
    batch_tokens: int,
    num_examples: int | None,
    num_steps: int | None,
    seed: int,
) -> list[list[Example]]:
    """Returns the batches of a phase: `num_steps` of them, or as many as `num_examples` examples of `data` fill.

    A batch is drawn until it holds `batch_tokens` tokens; each example comes from `mix` with probability `mix_fraction`.
    Every example of a set is seen once before any is seen again. No example is dropped: the last batch may be short.
    """
    assert (num_examples is None) != (num_steps is None)
    rng = random.Random(seed)
    own, other = _shuffled_forever(len(data), rng), _shuffled_forever(len(mix), rng)
    batches: list[list[Example]] = []
    batch: list[Example] = []
    num_own = 0
    for _ in itertools.count():
        if num_steps is not None and len(batches) == num_steps:
            break
        if num_examples is not None and num_own == num_examples:
            break
        if mix and rng.random() < mix_fraction:
            batch.append(mix[next(other)])
        else:
            batch.append(data[next(own)])
            num_own += 1
        if sum(map(len, batch)) >= batch_tokens:
            batches.append(batch)
            batch = []
    return [*batches, batch] if batch else batches
