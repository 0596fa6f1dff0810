"""Batched generation by transformers' `generate`. Works on token ids; knows nothing of rows, templates or files.

Shapes: B prompts, L tokens so far.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from training.packing import ATTENTION, use_attention


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """The options of a generation."""

    max_tokens: int
    end_ids: tuple[int, ...]
    """Tokens that end an answer. The first one is also the padding."""
    temperature: float = 0.0
    """0 is greedy; otherwise tokens are sampled from the whole distribution (no top_k, no top_p)."""
    stop: tuple[str, ...] = ()
    """Stop strings: an answer may end once its text contains one of them."""


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens that end an answer: the tokenizer's end-of-text first, then those of the model's generation config."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids = configured if isinstance(configured, list) else [configured]
    return tuple(dict.fromkeys(i for i in (tokenizer.eos_token_id, *ids) if i is not None))


def cut_at_end(ids: Sequence[int], options: GenerationOptions) -> tuple[list[int], bool]:
    """Return the tokens before the first end token, and whether there is an end token."""
    end = next((i for i, token in enumerate(ids) if token in options.end_ids), None)
    return list(ids[:end]), end is not None


class StopStrings(StoppingCriteria):
    """Stops the sequences whose last token completes a stop string. The prompt's text is not searched."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], num_prompt: int) -> None:
        super().__init__()
        self._tokenizer, self._stop, self._num_prompt = tokenizer, stop, num_prompt
        # Every token has at least one byte of text, so this many tokens hold any stop string.
        self._num_tail = max(len(text.encode()) for text in stop)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:  # noqa: ARG002  # transformers' own
        """Return a bool (B,) for the tokens (B, L): true for sequences that stop."""
        tails = input_ids[:, max(self._num_prompt, input_ids.shape[1] - self._num_tail) :].tolist()
        texts = self._tokenizer.decode_batch(tails, skip_special_tokens=True)
        return torch.tensor([any(stop in text for stop in self._stop) for text in texts], device=input_ids.device)


@torch.no_grad()
def generate(
    model: PreTrainedModel, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], options: GenerationOptions
) -> list[list[int]]:
    """Return the tokens generated after each of `prompts`, with end tokens and padding; see `cut_at_end`.

    The prompts are padded on the left to one width. A model with packed attention generates with SDPA and gets its attention
    back afterwards. The caller sets the model's mode (train or eval).
    """
    width = max(map(len, prompts))
    pad = options.end_ids[0]
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    # Every option is given explicitly: the model's own generation config may have top_k, top_p or penalties.
    sampling = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 1.0}
    with _generation_mode(model):
        out = model.generate(  # type: ignore[operator]  # transformers types generate as a tensor or a module
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=options.max_tokens,
            pad_token_id=pad,
            eos_token_id=list(options.end_ids),
            repetition_penalty=1.0,
            use_cache=True,
            stopping_criteria=StoppingCriteriaList([StopStrings(tokenizer, options.stop, width)] if options.stop else []),
            **(sampling if options.temperature else {"do_sample": False}),
        )
    rows: list[list[int]] = out[:, width:].tolist()
    return rows


@contextmanager
def _generation_mode(model: PreTrainedModel) -> Iterator[None]:
    # The last hidden states of a batch are a strided view of all states. For those, torch's product with the output embeddings
    # makes one copy of the embeddings for each prompt; a contiguous input avoids that.
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    # The packed attention has no KV cache.
    is_packed = model.config._attn_implementation == ATTENTION
    try:
        with use_attention(model, "sdpa") if is_packed else nullcontext():
            yield
    finally:
        handle.remove()
