"""Examples: rows as tokens, with prompts encoded as the server encodes them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from lori.errors import TemplateError
from lori.template import Template, encode, render_completion, render_prompt
from training.data.faults import DataError, Faults, collecting
from training.data.row import Row

if TYPE_CHECKING:  # importing transformers would make a program's --help slow
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Example:
    """One example as tokens. The loss is on `ids[num_prompt:]`.

    With `uses_kl` the loss is the KL divergence from the base model's distribution; otherwise it is the cross-entropy.
    """

    ids: tuple[int, ...]
    num_prompt: int
    uses_kl: bool = False
    origin: str = field(default="", compare=False)
    """Place of the example's row, such as "data.jsonl line 3"."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def examples(self) -> tuple["Example", ...]:
        """The example itself."""
        return (self,)


@dataclass(frozen=True, slots=True)
class Pair:
    """A preference pair: a better and a worse answer to one prompt. Its length is that of both answers together."""

    chosen: Example
    rejected: Example

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)

    @property
    def examples(self) -> tuple[Example, ...]:
        """The better answer, then the worse one."""
        return (self.chosen, self.rejected)


Item = Example | Pair
"""Unit of sampling. Each item has the same weight in the loss, whatever its length."""
ItemT = TypeVar("ItemT", Example, Pair)


def tokenize(
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Row],
    templates: Sequence[Template],
    max_length: int,
    uses_kl: bool = False,
    faults: Faults | None = None,
) -> list[Example]:
    """Return each row as tokens: rendered prompt, completion, end-of-text (except after a truncated completion).

    A row with a template of its own gives one example. Any other row gives an example under each of `templates`, or none if one
    of them fails. The prompt is encoded by itself, as the server encodes it. The completion is encoded as the continuation of
    the prompt.

    Nothing is cut. Rows longer than `max_length` tokens are faults. So are rows whose prompt has no token, rows without a token
    to predict, and rows that the chat template refuses. Without `faults`, such rows raise `DataError`. `DataError` is also raised
    if bad rows are skipped and no example is left.
    """
    with collecting(faults) as collected:
        encoder = _RowEncoder(tokenizer, max_length, uses_kl, collected)
        encoded = ((encoder.encode_answer(row, row.completion, t) for t in _templates(row, templates)) for row in rows)
        examples = [example for row_examples in encoded for example in _all_or_none(row_examples)]
    _check_not_empty(examples, collected)
    return examples


def tokenize_pairs(
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Row],
    templates: Sequence[Template],
    max_length: int,
    faults: Faults | None = None,
) -> list[Pair]:
    """Return each row's better and worse answer after its prompt. Works as `tokenize`; a fault of one answer drops the pair."""
    with collecting(faults) as collected:
        encoder = _RowEncoder(tokenizer, max_length, False, collected)
        encoded = ((encoder.encode_pair(row, template) for template in _templates(row, templates)) for row in rows)
        pairs = [pair for row_pairs in encoded for pair in _all_or_none(row_pairs)]
    _check_not_empty(pairs, collected)
    return pairs


def _templates(row: Row, templates: Sequence[Template]) -> Sequence[Template]:
    return [row.template] if row.template else templates


def _all_or_none(row_items: Iterable[ItemT | None]) -> list[ItemT]:
    """Return all items of a row, or none if one is None. Stops at the first None, so that a row has one fault at most."""
    items = []
    for item in row_items:
        if item is None:
            return []
        items.append(item)
    return items


def _check_not_empty(items: Sequence[object], faults: Faults) -> None:
    if not items and not faults.refuses:
        faults.raise_or_warn()
        raise DataError("no example is left")


@dataclass(frozen=True, slots=True)
class _RowEncoder:
    tokenizer: "PreTrainedTokenizerBase"
    max_length: int
    uses_kl: bool
    faults: Faults

    def encode_answer(self, row: Row, answer: str | None, template: Template) -> Example | None:
        """Return the row's prompt and `answer` as an example. Adds a fault and returns None if that is not possible."""
        assert answer is not None
        text = self._render_prompt(row, template)
        if text is None:
            return None
        prompt = encode(self.tokenizer, text).ids
        completion = self._encode_completion(text, prompt, render_completion(text, answer, template))
        completion += [] if row.truncated else [self.tokenizer.eos_token_id]
        length = len(prompt) + len(completion)
        if not prompt:
            self.faults.add("empty prompt", row.origin, f"under {template!r}")
        elif not completion:
            self.faults.add("nothing to predict", row.origin, f"under {template!r}")
        elif length > self.max_length:
            self.faults.add("too long", row.origin, f"{length} tokens under {template!r}, the limit is {self.max_length}")
        else:
            return Example((*prompt, *completion), len(prompt), self.uses_kl, row.origin)
        return None

    def _encode_completion(self, text: str, prompt: list[int], completion: str) -> list[int]:
        # The completion is encoded together with the prompt, since some tokenizers put a space before any text that they encode
        # by itself. It is encoded by itself only if a token would span the end of the prompt: the server never has such a token.
        ids: list[int] = encode(self.tokenizer, text + completion).ids
        if prompt and ids[: len(prompt)] == prompt:
            return ids[len(prompt) :]
        return list(encode(self.tokenizer, completion).ids)

    def encode_pair(self, row: Row, template: Template) -> Pair | None:
        """Return the row's prompt with its better and its worse answer. Adds a fault and returns None if that is not possible."""
        chosen = self.encode_answer(row, row.chosen, template)
        rejected = self.encode_answer(row, row.rejected, template) if chosen else None
        return Pair(chosen, rejected) if chosen and rejected else None

    def _render_prompt(self, row: Row, template: Template) -> str | None:
        try:
            return render_prompt(self.tokenizer, row.prompt, template)
        except TemplateError as error:
            if not self.tokenizer.chat_template:
                raise
            self.faults.add("chat template refuses", row.origin, str(error.__cause__))
        return None
