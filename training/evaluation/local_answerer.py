"""A loaded model as an answerer, just as it stands: a base, one with adapters applied, or one that is being trained."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lori.template import Template, encode, render_completion, render_prompt
from training.batches import Part, like_lengths
from training.data import Example
from training.evaluation.answerer import Answer, AnswerError, LogLikelihood, Prompt, Sampling
from training.generation import Generation, end_ids, generate, until_end
from training.loss import completion_logits
from training.packing import ATTENTION, attention, check_layers, pack

DEFAULT_BATCH_TOKENS = 4096
CACHED = 4
"""Tokens of prompts and answers that are computed together, for each that is scored."""
EMPTY = "a prompt is empty, and the model goes on from a token"
NUM_SHOWN = 20
"""Tokens of a text that show which one it is."""
Asked = TypeVar("Asked")
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class LocalAnswerer:
    """Computes with `model` itself and applies nothing to it. Its mode, attention and random numbers are left as they were.

    `template` writes the prompts. `batch_tokens` are scored together, and the logits of all may be held
    twice in fp32. Where answers are generated, a batch has `CACHED` times as many: logits are those of one token a prompt.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: Template = "plain"
    batch_tokens: int = DEFAULT_BATCH_TOKENS

    def complete(self, prompts: Sequence[Prompt], how: Sampling) -> list[list[str]]:
        """See `Answerer`. Sampled answers also depend on `batch_tokens` and on the other prompts."""
        repeated = [prompt for prompt in prompts for _ in range(how.num_answers)]
        texts = [answer.text for answer in self.answers(repeated, how)]
        return [texts[i : i + how.num_answers] for i in range(0, len(texts), how.num_answers)]

    def answers(self, prompts: Sequence[Prompt], how: Sampling) -> list[Answer]:
        """Return one answer to each prompt, whatever `how.num_answers` is."""
        encoded = [self._encode(prompt) for prompt in prompts]
        generation = Generation(how.max_tokens, end_ids(self.model, self.tokenizer), how.temperature, how.stop)

        def answered(batch: Sequence[list[int]]) -> list[Answer]:
            outs = generate(self.model, self.tokenizer.backend_tokenizer, batch, generation)
            return [self._answer(ids, out, generation) for ids, out in zip(batch, outs, strict=True)]

        with self._as_it_was(how.seed):
            lengths = [len(ids) + how.max_tokens for ids in encoded]
            self._check_context(encoded, lengths, f"with answers of up to {how.max_tokens} tokens (--max-tokens) ")
            return self._by_batch(answered, encoded, lengths, CACHED * self.batch_tokens)

    def has_room(self, prompt: Prompt, max_tokens: int) -> bool:
        """Return whether the model's context holds `prompt` with an answer of so many tokens."""
        return self._limit is None or len(self._encode(prompt)) + max_tokens <= self._limit

    def have_room(self, prompts: Sequence[Prompt], max_tokens: int) -> list[bool]:
        """Say of each prompt whether the model's context holds it with an answer of so many tokens."""
        return [self.has_room(prompt, max_tokens) for prompt in prompts]

    def log_likelihoods(self, texts: Sequence[tuple[Prompt, str]]) -> list[LogLikelihood]:
        """See `Answerer`. Logits are computed where they are looked at alone."""
        check_layers(self.model.config.get_text_config())
        examples = [self._example(*text) for text in texts]
        lengths = list(map(len, examples))
        self._check_context([example.ids for example in examples], lengths)
        with torch.no_grad(), self._as_it_was(), attention(self.model, ATTENTION):
            return self._by_batch(self._scores, examples, lengths, self.batch_tokens)

    def _encode(self, prompt: Prompt) -> list[int]:
        ids = encode(self.tokenizer, render_prompt(self.tokenizer, prompt, self.template)).ids
        if not ids:
            raise AnswerError(EMPTY)
        return ids

    def _example(self, prompt: Prompt, completion: str) -> Example:
        text = render_prompt(self.tokenizer, prompt, self.template)
        if not text:
            raise AnswerError(EMPTY)
        encoding = encode(self.tokenizer, text + render_completion(text, completion, self.template))
        num_prompt = sum(end <= len(text) for _, end in encoding.offsets)
        return Example(tuple(encoding.ids), max(1, num_prompt))  # nothing predicts the first token

    def _scores(self, examples: Sequence[Example]) -> list[LogLikelihood]:
        counts = [len(example) - example.num_prompt for example in examples]
        if not any(counts):
            return [LogLikelihood(0.0, 0)] * len(examples)
        some = tuple(example for example, count in zip(examples, counts, strict=True) if count)
        batch = pack(Part(some, 1.0)).to(self.model.device)
        losses = F.cross_entropy(completion_logits(self.model, batch), batch.targets, reduction="none")
        return [LogLikelihood(-float(part.double().sum()), len(part)) for part in losses.cpu().split(counts)]

    def _answer(self, prompt: list[int], out: list[int], how: Generation) -> Answer:
        # A token's text may depend on those before it, so the prompt's are read too.
        out, is_whole = until_end(out, how)
        decode = self.tokenizer.backend_tokenizer.decode_batch
        before, whole = map(str, decode([prompt, prompt + out], skip_special_tokens=True))
        text = whole[len(before) :].rstrip("\ufffd")  # what a longer answer would have made a character of
        return Answer(text[: min((at for stop in how.stop if (at := text.find(stop)) >= 0), default=len(text))], is_whole)

    def _by_batch(
        self, compute: Callable[[Sequence[Asked]], list[Found]], items: Sequence[Asked], lengths: Sequence[int], num_tokens: int
    ) -> list[Found]:
        """Return what `compute` finds for each of `items`, `num_tokens` of like `lengths` at a time."""
        found: dict[int, Found] = {}
        with tqdm(total=len(items), unit="text", disable=None) as bar:
            for places in like_lengths(lengths, num_tokens):
                found |= zip(places, compute([items[i] for i in places]), strict=True)
                bar.update(len(places))
        return [found[i] for i in range(len(items))]

    @property
    def _limit(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def _check_context(self, texts: Sequence[Sequence[int]], lengths: Sequence[int], how: str = "") -> None:
        if self._limit is None or not (long := [place for place, length in enumerate(lengths) if length > self._limit]):
            return
        begin = self.tokenizer.decode(list(texts[long[0]][:NUM_SHOWN]))
        said = f"{how}{len(long)} of {len(texts)} texts have more tokens than the model's context, {self._limit}"
        raise AnswerError(f"{said}: the first has {lengths[long[0]]}, and begins {begin!r}")

    @contextmanager
    def _as_it_was(self, seed: int = 0) -> Iterator[None]:
        """Inside, the model is in evaluation mode and torch's random numbers are those of `seed`."""
        was_training = self.model.training
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            self.model.eval()
            try:
                yield
            finally:
                self.model.train(was_training)
