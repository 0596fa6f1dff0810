"""Answers by transformers' `generate`, many prompts together. Knows token ids; nothing of rows, templates or files.

Shapes: B prompts, L tokens until now.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from training.packing import ATTENTION, attention


@dataclass(frozen=True, slots=True)
class Generation:
    """How answers are generated."""

    max_tokens: int
    end_ids: tuple[int, ...]
    """Tokens that end an answer; the first also pads."""
    temperature: float = 0.0
    """0 is greedy; else all of the distribution is drawn from."""
    stop: tuple[str, ...] = ()
    """An answer may end once its text has one of these."""


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens that end an answer: the tokenizer's own first, then those that the model's config names."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids = configured if isinstance(configured, list) else [configured]
    return tuple(dict.fromkeys(i for i in (tokenizer.eos_token_id, *ids) if i is not None))


def until_end(ids: Sequence[int], how: Generation) -> tuple[list[int], bool]:
    """Return the tokens before the first that ends an answer, and whether there is one."""
    place = next((i for i, token in enumerate(ids) if token in how.end_ids), None)
    return list(ids[:place]), place is not None


class StopTexts(StoppingCriteria):
    """Says which rows have a stop text that ends in their last token. The prompt's text is not looked at."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], num_prompt: int) -> None:
        super().__init__()
        self._tokenizer, self._stop, self._num_prompt = tokenizer, stop, num_prompt
        # A token has a byte of text at least.
        self._num_tail = max(len(text.encode()) for text in stop)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:  # noqa: ARG002  # transformers' own
        """Return (B,) bool for the tokens (B, L)."""
        tails = input_ids[:, max(self._num_prompt, input_ids.shape[1] - self._num_tail) :].tolist()
        texts = self._tokenizer.decode_batch(tails, skip_special_tokens=True)
        return torch.tensor([any(stop in text for stop in self._stop) for text in texts], device=input_ids.device)


@torch.no_grad()
def generate(model: PreTrainedModel, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], how: Generation) -> list[list[int]]:
    """Return the tokens that follow each of `prompts`, padded on their left to one width; see `until_end`.

    The attention of a model in training is restored; its mode is the caller's.
    """
    width = max(map(len, prompts))
    pad = how.end_ids[0]
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    # Everything is said: a model's own generation config may sample, cut or penalise.
    drawn = {"do_sample": True, "temperature": how.temperature, "top_k": 0, "top_p": 1.0}
    with _able_to_generate(model):
        out = model.generate(  # type: ignore[operator]  # transformers types generate as a tensor or a module
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=how.max_tokens,
            pad_token_id=pad,
            eos_token_id=list(how.end_ids),
            repetition_penalty=1.0,
            use_cache=True,
            stopping_criteria=StoppingCriteriaList([StopTexts(tokenizer, how.stop, width)] if how.stop else []),
            **(drawn if how.temperature else {"do_sample": False}),
        )
    rows: list[list[int]] = out[:, width:].tolist()
    return rows


@contextmanager
def _able_to_generate(model: PreTrainedModel) -> Iterator[None]:
    # Of a batch's last hidden states, a view of all, torch makes a product with one copy of the embeddings for each prompt.
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    # The packed attention keeps no keys.
    is_packed = model.config._attn_implementation == ATTENTION
    try:
        with attention(model, "sdpa") if is_packed else nullcontext():
            yield
    finally:
        handle.remove()
