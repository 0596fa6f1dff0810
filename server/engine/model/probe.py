"""Proves at start that a model is served right: the runner's logits must be those that the model gives by itself."""

from itertools import pairwise

import torch
from transformers import PreTrainedModel

from lori.errors import ModelError
from server.engine.model.runner import Runner
from server.engine.request import Request, Sequence
from server.engine.scheduling.scheduler import Chunk

NUM_TOKENS = 40
"""Of the probe: more than two blocks of 16, where there is room for them."""
MAX_ERROR = 0.1
"""Relative: bf16 rounds, a wrong attention or scale does much more."""


def own_logits(model: PreTrainedModel) -> torch.Tensor:
    """Returns the logits (P, V) fp32 of the probe that `model` gives by itself, for `check`."""
    model.set_attn_implementation("eager")  # others leave out what a family does to its scores
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([_ids(model, NUM_TOKENS)], device=model.device)).logits[0].float()
    return logits


def check(runner: Runner, model: PreTrainedModel, expected: torch.Tensor, max_context: int, block_size: int) -> None:
    """Raises `ModelError` unless the runner gives the `expected` logits of the probe, or of as much of it as the context holds.

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
