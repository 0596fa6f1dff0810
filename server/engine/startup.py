"""Measurements before a server listens: a probe of the model's answers, and the timing of steps."""

import time
from collections.abc import Sequence as Items
from itertools import accumulate, count, pairwise, takewhile
from math import inf

import torch
from transformers import PreTrainedModel

from lori.errors import ModelError
from server.engine.model.runner import Runner
from server.engine.request import Chunk, Request, Sequence
from server.engine.scheduling.step_budget import Curve, StepCost
from server.engine.step import Turn

NUM_TURNS, MAX_SECONDS = 5, 0.5
"""How often each step is timed: once and, as that may have to compile, again; less often where these took so long already."""
MAX_BATCH = 64
"""Sequences that decode together in the largest step that is timed."""
MUCH_LONGER = 3
"""Times as long as the shortest step: larger ones are not timed, for beside decoding none as long is planned."""
FAR, NUM_FAR = 1024, 8
"""Keys before a token that stands far into a context, and how many sequences decode there."""


def measure_step_cost(
    turn: Turn, *, num_ids: int, max_tokens: int, max_sequences: int, max_context: int, num_blocks: int, block_size: int
) -> StepCost:
    """Return what steps of up to `max_tokens` and `max_sequences` cost here, sampling and all.

    A few steps of several sizes are timed, at the start of a context and far into one. `num_ids`: tokens below it are known.
    """

    def chunk(size: int, start: int = 0, first_block: int = 0) -> Chunk:
        # The last of its sequence: what is sampled after it is waited for, on any device.
        ids = tuple(place * 7919 % num_ids for place in range(start + size))
        request = Request(id="timed", prompt_text="", prompt_ids=ids, prompt_offsets=(), max_tokens=1)
        sequence = Sequence(request, blocks=list(range(first_block, first_block - (-len(ids) // block_size))))
        sequence.terms = []
        return Chunk(sequence, start, start + size)

    prompts = _worthwhile(turn, [[chunk(size)] for size in _sizes(min(max_tokens, max_context // 2))])
    counts = tuple(step[0].stop for step in prompts)
    batches = _sizes(min(max_sequences, MAX_BATCH))
    decoding = [chunk(1) for _ in range(batches[-1])]
    # Reading the keys there takes as long whatever they are, if they are not the same ones.
    far = min(FAR, max_context - counts[-1])
    apart = far // block_size + 1
    few = [chunk(1, far, apart * place) for place in range(min(NUM_FAR, max_sequences, num_blocks // apart))]
    steps = [*prompts, *(decoding[:size] for size in batches), few, [chunk(counts[-1], far)]]
    *near, by_few, by_many = _times(turn, steps)
    of_prompts, of_batches = (
        Curve(at, tuple(accumulate(part, max))) for at, part in ((counts, near[: len(counts)]), (batches, near[len(counts) :]))
    )
    # A chunk reads each key once, and each of its tokens attends to it.
    for_one = max(0.0, by_few - of_batches(len(few))) / len(few) / far
    for_many = max(0.0, by_many - of_prompts(counts[-1])) / far
    per_pair = max(0.0, for_many - for_one) / max(1, counts[-1] - 1)
    return StepCost(prompt=of_prompts, decoding=of_batches, per_key=max(0.0, for_one - per_pair), per_pair=per_pair)


def _sizes(most: int) -> tuple[int, ...]:
    # 1, 8, 16, 32, and so on to the most: up to 8 tokens a product takes no longer than reading its weights.
    return tuple(sorted({1, *takewhile(lambda size: size < most, (2**power for power in count(3))), most}))


def _worthwhile(turn: Turn, steps: Items[Items[Chunk]]) -> Items[Items[Chunk]]:
    # The steps up to the first that takes much longer than the shortest.
    shortest = inf
    for place, step in enumerate(steps, 1):
        seconds = min(_time(turn, step) for _ in range(2))  # the first of its size may have to compile
        shortest = min(shortest, seconds)
        if seconds > MUCH_LONGER * shortest:
            return steps[:place]
    return steps


def _times(turn: Turn, steps: Items[Items[Chunk]]) -> list[float]:
    # The least of each: what else the machine does only adds to it. In turn, for it may be busy for a while.
    turns: list[list[float]] = []
    while len(turns) < NUM_TURNS and sum(map(sum, turns[1:])) < MAX_SECONDS:
        turns.append([_time(turn, step) for step in steps])
    return [min(of_step) for of_step in zip(*turns, strict=True)]


def _time(turn: Turn, step: Items[Chunk]) -> float:
    started = time.perf_counter()
    turn.compute(step)
    return time.perf_counter() - started


NUM_TOKENS = 40
"""Of the probe: more than two blocks of 16, where there is room for them."""
MAX_ERROR = 0.1
"""Relative: bf16 rounds, a wrong attention or scale does much more."""


def own_logits(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits (P, V) fp32 of the probe that `model` gives by itself, for `check`."""
    model.set_attn_implementation("eager")  # others leave out what a family does to its scores
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([_ids(model, NUM_TOKENS)], device=model.device)).logits[0].float()
    return logits


def check(runner: Runner, model: PreTrainedModel, expected: torch.Tensor, max_context: int, block_size: int) -> None:
    """Raise `ModelError` unless the runner gives the `expected` logits of the probe, or of as much of it as the context holds.

    It runs as a prompt, as a later chunk of it, and as a decoding step.
    """
    count = min(NUM_TOKENS, max_context)
    sequence, expected = _sequence(_ids(model, count), block_size), expected[:count]
    cuts = (0, count * 2 // 3, count - 1, count)
    parts = [runner.forward([Chunk(sequence, start, stop)], range(stop - start)) for start, stop in pairwise(cuts)]
    difference = ((torch.cat(parts) - expected).norm() / expected.norm()).item()
    if not difference <= MAX_ERROR:
        raise ModelError(
            f"this {model.config.model_type} model is not served: what is computed here, quantized or not, gives other logits "
            f"than the model itself (relative difference {difference:.3f}, at most {MAX_ERROR} expected)"
        )


def _sequence(ids: tuple[int, ...], block_size: int) -> Sequence:
    request = Request(id="probe", prompt_text="", prompt_ids=ids, prompt_offsets=(), max_tokens=0)
    sequence = Sequence(request, blocks=list(range(-(-len(ids) // block_size))))
    sequence.terms = []
    return sequence


def _ids(model: PreTrainedModel, count: int) -> tuple[int, ...]:
    size = model.config.get_text_config().vocab_size
    return tuple(place * 7919 % size for place in range(count))
