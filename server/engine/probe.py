"""Proves at start that a model is served right: the runner's logits must be those that the model gives by itself."""

from itertools import pairwise

import torch
from transformers import PreTrainedModel

from lori.errors import ModelError
from server.engine.attention import ATTENTION
from server.engine.request import Request, Sequence
from server.engine.runner import Runner
from server.engine.scheduler import Chunk

CUTS = (0, 8, 11, 12)
"""The probe runs as a prompt, as a later chunk of it, and as a decoding step."""
MAX_ERROR = 0.1
"""Relative: bf16 rounds, a wrong attention or scale does much more."""


def use_paged_attention(model: PreTrainedModel) -> torch.Tensor:
    """Switches `model` to paged attention and returns the logits (P, V) of the probe that it gave before, for `check`."""
    with torch.inference_mode():
        before: torch.Tensor = model(torch.tensor([_ids(model)], device=model.device)).logits[0].float()
    model.set_attn_implementation(ATTENTION)
    return before


def check(runner: Runner, model: PreTrainedModel, expected: torch.Tensor, block_size: int) -> None:
    """Raises `ModelError` unless the runner gives the `expected` logits of the probe."""
    sequence = Sequence(probe_request(_ids(model)), blocks=list(range(-(-CUTS[-1] // block_size))))
    try:
        parts = [runner.forward([Chunk(sequence, start, stop)], range(stop - start)) for start, stop in pairwise(CUTS)]
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise ModelError(f"models of type {model.config.model_type!r} are not served: {error}") from error
    difference = ((torch.cat(parts) - expected).norm() / expected.norm()).item()
    if not difference <= MAX_ERROR:
        raise ModelError(
            f"models of type {model.config.model_type!r} are not served: paged attention gives other logits than the "
            f"model itself (relative difference {difference:.3f}, at most {MAX_ERROR} expected)"
        )


def probe_request(ids: tuple[int, ...]) -> Request:
    """Returns a request of the base model on `ids`."""
    return Request(
        id="probe", prompt_text="", prompt_ids=ids, prompt_offsets=(0,) * len(ids), terms=(), max_tokens=0,
        temperature=0.0, seed=0, stop=(), num_logprobs=None, echo=False,
    )  # fmt: skip


def _ids(model: PreTrainedModel) -> tuple[int, ...]:
    size = model.config.get_text_config().vocab_size
    return tuple(place * 7919 % size for place in range(CUTS[-1]))
