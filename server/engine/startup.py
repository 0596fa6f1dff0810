"""Measurements before a server listens: a check of the model's logits, and the timing of steps."""

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
from server.engine.step import StepExecutor

NUM_ROUNDS, MAX_SECONDS = 5, 0.5
"""Maximum number of timing rounds, and the seconds after which no further round begins. The first round may include compilation,
so there are at least two."""
MAX_BATCH = 64
"""Maximum number of sequences that decode together in a timed step."""
SLOW_FACTOR = 3
"""Steps that take more than this many times the shortest step are the last to be timed: beside decoding, no step that long is
planned."""
FAR, NUM_FAR = 1024, 8
"""Number of keys before a token far into a context, and number of sequences that decode there."""


def measure_step_cost(
    executor: StepExecutor,
    *,
    num_ids: int,
    max_tokens: int,
    max_sequences: int,
    max_context: int,
    num_blocks: int,
    block_size: int,
) -> StepCost:
    """Return the cost of steps of up to `max_tokens` and `max_sequences` on this machine, including sampling.

    A few steps of several sizes are timed, at the start of a context and far into one. Token ids are below `num_ids`.
    """

    def chunk(size: int, start: int = 0, first_block: int = 0) -> Chunk:
        # The chunk is its sequence's last, so a token is sampled, and `compute` waits for the device.
        ids = tuple(index * 7919 % num_ids for index in range(start + size))
        request = Request(id="timed", prompt_text="", prompt_ids=ids, prompt_offsets=(), max_tokens=1)
        sequence = Sequence(request, blocks=list(range(first_block, first_block - (-len(ids) // block_size))))
        sequence.terms = []
        return Chunk(sequence, start, start + size)

    prompt_steps = _until_slow(executor, [[chunk(size)] for size in _sizes(min(max_tokens, max_context // 2))])
    prompt_sizes = tuple(step[0].stop for step in prompt_steps)
    batch_sizes = _sizes(min(max_sequences, MAX_BATCH))
    decoding_chunks = [chunk(1) for _ in range(batch_sizes[-1])]
    # Reading the keys takes as long whatever their values are, as long as each sequence reads its own.
    num_far_keys = min(FAR, max_context - prompt_sizes[-1])
    num_far_blocks = num_far_keys // block_size + 1
    far_batch = [
        chunk(1, num_far_keys, num_far_blocks * index)
        for index in range(min(NUM_FAR, max_sequences, num_blocks // num_far_blocks))
    ]
    steps = [*prompt_steps, *(decoding_chunks[:size] for size in batch_sizes), far_batch, [chunk(prompt_sizes[-1], num_far_keys)]]
    *near, far_batch_seconds, far_prompt_seconds = _measure_all(executor, steps)
    prompt_curve, decoding_curve = (
        Curve(sizes, tuple(accumulate(seconds, max)))
        for sizes, seconds in ((prompt_sizes, near[: len(prompt_sizes)]), (batch_sizes, near[len(prompt_sizes) :]))
    )
    # A chunk reads each key once, and each of its tokens attends to the key.
    per_key_of_token = max(0.0, far_batch_seconds - decoding_curve(len(far_batch))) / len(far_batch) / num_far_keys
    per_key_of_chunk = max(0.0, far_prompt_seconds - prompt_curve(prompt_sizes[-1])) / num_far_keys
    per_pair = max(0.0, per_key_of_chunk - per_key_of_token) / max(1, prompt_sizes[-1] - 1)
    return StepCost(
        prompt=prompt_curve, decoding=decoding_curve, per_key=max(0.0, per_key_of_token - per_pair), per_pair=per_pair
    )


def _sizes(max_size: int) -> tuple[int, ...]:
    # 1, 8, 16, 32 and so on up to the maximum. Up to 8 tokens, a matrix product takes no longer than reading its weights.
    return tuple(sorted({1, *takewhile(lambda size: size < max_size, (2**power for power in count(3))), max_size}))


def _until_slow(executor: StepExecutor, steps: Items[Items[Chunk]]) -> Items[Items[Chunk]]:
    # The steps up to and including the first that takes much longer than the shortest.
    shortest = inf
    for num_steps, step in enumerate(steps, 1):
        seconds = min(_measure(executor, step) for _ in range(2))  # the first step of a size may have to compile
        shortest = min(shortest, seconds)
        if seconds > SLOW_FACTOR * shortest:
            return steps[:num_steps]
    return steps


def _measure_all(executor: StepExecutor, steps: Items[Items[Chunk]]) -> list[float]:
    # The minimum of each step: other load on the machine only adds time. Rounds alternate the steps, since load may last a while.
    rounds: list[list[float]] = []
    while len(rounds) < NUM_ROUNDS and sum(map(sum, rounds[1:])) < MAX_SECONDS:
        rounds.append([_measure(executor, step) for step in steps])
    return [min(seconds) for seconds in zip(*rounds, strict=True)]


def _measure(executor: StepExecutor, step: Items[Chunk]) -> float:
    started = time.perf_counter()
    executor.compute(step)
    return time.perf_counter() - started


NUM_TOKENS = 40
"""Number of tokens of the probe: more than two blocks of 16, if the context has room for them."""
MAX_ERROR = 0.1
"""Maximum relative error: bf16 rounding stays below it; a wrong attention or scale exceeds it by far."""


def reference_logits(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits (P, V) fp32 that `model` itself computes for the probe. `check_logits` expects them."""
    model.set_attn_implementation("eager")  # other implementations leave out what a family does to its scores
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([_ids(model, NUM_TOKENS)], device=model.device)).logits[0].float()
    return logits


def check_logits(runner: Runner, model: PreTrainedModel, expected: torch.Tensor, max_context: int, block_size: int) -> None:
    """Raise `ModelError` unless the runner computes the `expected` logits for the probe, or for as much as the context holds.

    The probe is computed in three steps: a prompt, a later chunk of it, and a decoding step. Then the prompt is computed again as
    one is served, with the logits of its last token alone.
    """
    count = min(NUM_TOKENS, max_context)
    sequence = _sequence(_ids(model, count), block_size)
    cuts = (0, count * 2 // 3, count - 1, count)
    parts = [runner.forward([Chunk(sequence, start, stop)], range(stop - start)) for start, stop in pairwise(cuts)]
    parts.append(runner.forward([Chunk(sequence, 0, cuts[1])], [cuts[1] - 1]))
    expected = torch.cat([expected[:count], expected[cuts[1] - 1 : cuts[1]]])
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
    return tuple(position * 7919 % size for position in range(count))
