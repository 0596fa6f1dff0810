"""A loaded model as an answerer: a base, a base with adapters applied, or a model in training."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lori.base_model import BaseModel
from lori.template import Template, encode, render_completion, render_prompt
from training.batches import MicroBatch, group_by_length
from training.data import DataError, Example, Row
from training.evaluation.answerer import Answer, AnswerError, LogLikelihood, Prompt, Sampling
from training.generation import GenerationOptions, cut_at_end, end_ids, generate
from training.loss import completion_logits
from training.packing import ATTENTION, check_layers, pack, use_attention

DEFAULT_BATCH_TOKENS = 4096
GENERATION_FACTOR = 4
"""Tokens (prompts and answers) of a batch when answers are generated, relative to a batch when texts are scored."""
EMPTY = "a prompt is empty, and the model goes on from a token"
NUM_SHOWN = 20
"""Number of a text's first tokens that an error message shows."""
InputT = TypeVar("InputT")
OutputT = TypeVar("OutputT")


@dataclass(frozen=True, slots=True)
class LocalAnswerer:
    """A loaded `model` as an answerer. It applies no adapter. It restores the model's mode, its attention and the random state.

    `template` formats the prompts. Texts are scored in batches of `batch_tokens`; the logits of all these tokens may be in memory
    twice, in fp32. A batch for generation has `GENERATION_FACTOR` times as many tokens, since only one token a prompt has logits.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: Template = "plain"
    batch_tokens: int = DEFAULT_BATCH_TOKENS
    shows_progress: bool = True
    """Whether a bar is drawn on a terminal."""

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[str]]:
        """See `Answerer`. Sampled answers also depend on `batch_tokens` and on the other prompts."""
        repeated = [prompt for prompt in prompts for _ in range(sampling.num_answers)]
        texts = [answer.text for answer in self.answers(repeated, sampling)]
        return [texts[i : i + sampling.num_answers] for i in range(0, len(texts), sampling.num_answers)]

    def answers(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Answer]:
        """Return one answer to each prompt. Ignores `sampling.num_answers`."""
        encoded = [self._encode(prompt) for prompt in prompts]
        options = GenerationOptions(sampling.max_tokens, end_ids(self.model, self.tokenizer), sampling.temperature, sampling.stop)

        def answer_batch(batch: Sequence[list[int]]) -> list[Answer]:
            outputs = generate(self.model, self.tokenizer.backend_tokenizer, batch, options)
            return [self._answer(ids, output, options) for ids, output in zip(batch, outputs, strict=True)]

        with self._evaluation_mode(sampling.seed):
            lengths = [len(ids) + sampling.max_tokens for ids in encoded]
            self._check_context(encoded, lengths, f"with answers of up to {sampling.max_tokens} tokens (--max-tokens) ")
            return self._compute_in_batches(answer_batch, encoded, lengths, GENERATION_FACTOR * self.batch_tokens)

    def has_room(self, prompt: Prompt, max_tokens: int) -> bool:
        """Return whether `prompt` and an answer of `max_tokens` fit the model's context."""
        return self._context_length is None or len(self._encode(prompt)) + max_tokens <= self._context_length

    def have_room(self, prompts: Sequence[Prompt], max_tokens: int) -> list[bool]:
        """Return, for each prompt, whether the prompt and an answer of `max_tokens` fit the model's context."""
        return [self.has_room(prompt, max_tokens) for prompt in prompts]

    def log_likelihoods(self, texts: Sequence[tuple[Prompt, str]]) -> list[LogLikelihood]:
        """See `Answerer`. Computes logits for the completions' tokens only."""
        check_layers(self.model.config.get_text_config())
        examples = [self._example(*text) for text in texts]
        lengths = list(map(len, examples))
        self._check_context([example.ids for example in examples], lengths)
        with torch.no_grad(), self._evaluation_mode(), use_attention(self.model, ATTENTION):
            return self._compute_in_batches(self._score_batch, examples, lengths, self.batch_tokens)

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

    def _score_batch(self, examples: Sequence[Example]) -> list[LogLikelihood]:
        counts = [len(example) - example.num_prompt for example in examples]
        if not any(counts):
            return [LogLikelihood(0.0, 0)] * len(examples)
        scored = tuple(example for example, count in zip(examples, counts, strict=True) if count)
        batch = pack(MicroBatch(scored, 1.0)).to(self.model.device)
        losses = F.cross_entropy(completion_logits(self.model, batch), batch.targets, reduction="none")
        return [LogLikelihood(-float(part.double().sum()), len(part)) for part in losses.cpu().split(counts)]

    def _answer(self, prompt: list[int], output: list[int], options: GenerationOptions) -> Answer:
        # The text of a token may depend on the tokens before it, so the prompt is decoded, too.
        output, is_whole = cut_at_end(output, options)
        decode = self.tokenizer.backend_tokenizer.decode_batch
        prompt_text, whole_text = map(str, decode([prompt, prompt + output], skip_special_tokens=True))
        text = whole_text[len(prompt_text) :].rstrip("\ufffd")  # drop an incomplete UTF-8 character at the end
        return Answer(text[: min((i for stop in options.stop if (i := text.find(stop)) >= 0), default=len(text))], is_whole)

    def _compute_in_batches(
        self,
        compute: Callable[[Sequence[InputT]], list[OutputT]],
        items: Sequence[InputT],
        lengths: Sequence[int],
        num_tokens: int,
    ) -> list[OutputT]:
        """Return the result of `compute` for each of `items`, called on batches of about `num_tokens` and similar `lengths`."""
        results: dict[int, OutputT] = {}
        with tqdm(total=len(items), unit="text", disable=None if self.shows_progress else True) as bar:
            for indices in group_by_length(lengths, num_tokens):
                results |= zip(indices, compute([items[i] for i in indices]), strict=True)
                bar.update(len(indices))
        return [results[i] for i in range(len(items))]

    @property
    def _context_length(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def _check_context(self, texts: Sequence[Sequence[int]], lengths: Sequence[int], prefix: str = "") -> None:
        if self._context_length is None or not (
            too_long := [i for i, length in enumerate(lengths) if length > self._context_length]
        ):
            return
        beginning = self.tokenizer.decode(list(texts[too_long[0]][:NUM_SHOWN]))
        message = (
            f"{prefix}{len(too_long)} of {len(texts)} texts have more tokens than the model's context, {self._context_length}"
        )
        raise AnswerError(f"{message}: the first has {lengths[too_long[0]]}, and begins {beginning!r}")

    @contextmanager
    def _evaluation_mode(self, seed: int = 0) -> Iterator[None]:
        """Context manager: the model is in evaluation mode and torch's random state is that of `seed`."""
        was_training = self.model.training
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            self.model.eval()
            try:
                yield
            finally:
                self.model.train(was_training)


def row_template(row: Row, templates: Sequence[Template]) -> Template:
    """Return the template under which a row is measured: its own, else plain prompts as they stand if `templates` has that.

    `templates` are those that an adapter, or all adapters of a merge, were trained on. Raises `DataError` if the row's own is not
    among them.
    """
    if row.template and row.template not in templates:
        raise DataError(f"{row.origin} has the template {row.template!r}, expected one of the adapter's: {', '.join(templates)}")
    preferred: Template = "plain" if isinstance(row.prompt, str) else "chat"
    return row.template or (preferred if preferred in templates else templates[0])


def row_log_likelihoods(
    base: BaseModel, rows: Sequence[Row], templates: Sequence[Template], *, shows_progress: bool = True
) -> list[LogLikelihood]:
    """Return the log-likelihood of each row's answer on `base.model` as it is now. For `templates` see `row_template`."""
    row_templates = [row_template(row, templates) for row in rows]
    results: dict[int, LogLikelihood] = {}
    for template in sorted({*row_templates}):
        chosen = [i for i, own in enumerate(row_templates) if own == template]
        answerer = LocalAnswerer(base.model, base.tokenizer, template, shows_progress=shows_progress)
        results |= zip(chosen, answerer.log_likelihoods([(rows[i].prompt, rows[i].answer_text) for i in chosen]), strict=True)
    return [results[i] for i in range(len(rows))]
