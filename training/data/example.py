"""Rows as tokens, as the server will read them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from lori.errors import TemplateError
from lori.template import Template, encode, render_completion, render_prompt
from training.data.faults import DataError, Faults, settled
from training.data.row import Row

if TYPE_CHECKING:  # a program's --help need not wait for transformers
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Example:
    """One example as tokens: the loss is on `ids[num_prompt:]`.

    An example that `keeps_base` is not learnt: there the adapted model is held to the base model's own distribution.
    """

    ids: tuple[int, ...]
    num_prompt: int
    keeps_base: bool = False
    origin: str = field(default="", compare=False)
    """Where its row was read, such as "data.jsonl line 3"."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def examples(self) -> tuple["Example", ...]:
        """Itself."""
        return (self,)


@dataclass(frozen=True, slots=True)
class Pair:
    """A better and a worse answer to one prompt. Their tokens count together."""

    chosen: Example
    rejected: Example

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)

    @property
    def examples(self) -> tuple[Example, ...]:
        """Both, the better one first."""
        return (self.chosen, self.rejected)


Item = Example | Pair
"""What is drawn, and weighs the same in the loss, whatever its length."""
Written = TypeVar("Written", Example, Pair)


def tokenize(
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Row],
    templates: Sequence[Template],
    max_length: int,
    keeps_base: bool = False,
    faults: Faults | None = None,
) -> list[Example]:
    """Return each row as tokens: rendered prompt, completion, end-of-text (but for a truncated completion).

    A row that names no template of its own gives an example under each of `templates`, or none where one fails. The prompt is
    encoded by itself, as the server encodes it, and the completion as what follows it. Nothing is cut: rows longer than
    `max_length` tokens go into `faults`, as do those without a token in their prompt, or to predict, and those that the chat
    template refuses; without `faults` they are refused with `DataError`, and so is an empty rest.
    """
    with settled(faults) as found:
        writer = _Writer(tokenizer, max_length, keeps_base, found)
        written = ((writer.write(row, row.completion, template) for template in _templates(row, templates)) for row in rows)
        examples = [example for of_row in written for example in _whole(of_row)]
    _check_left(examples, found)
    return examples


def tokenize_pairs(
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Row],
    templates: Sequence[Template],
    max_length: int,
    faults: Faults | None = None,
) -> list[Pair]:
    """Return each row's better and worse answer after its prompt, as `tokenize` writes them; where one fails, the pair does."""
    with settled(faults) as found:
        writer = _Writer(tokenizer, max_length, False, found)
        written = ((writer.write_pair(row, template) for template in _templates(row, templates)) for row in rows)
        pairs = [pair for of_row in written for pair in _whole(of_row)]
    _check_left(pairs, found)
    return pairs


def _templates(row: Row, templates: Sequence[Template]) -> Sequence[Template]:
    return [row.template] if row.template else templates


def _whole(of_row: Iterable[Written | None]) -> list[Written]:
    """Return what is written of a row, or nothing where some of it is None: a row is left out whole, at its first fault."""
    written = []
    for one in of_row:
        if one is None:
            return []
        written.append(one)
    return written


def _check_left(written: Sequence[object], faults: Faults) -> None:
    if not written and not faults.refuses:
        faults.settle()
        raise DataError("no example is left")


@dataclass(frozen=True, slots=True)
class _Writer:
    tokenizer: "PreTrainedTokenizerBase"
    max_length: int
    keeps_base: bool
    faults: Faults

    def write(self, row: Row, answer: str | None, template: Template) -> Example | None:
        """Return `answer` after the row's prompt; None where that is a fault, which is noted."""
        assert answer is not None
        text = self._prompt(row, template)
        if text is None:
            return None
        prompt = encode(self.tokenizer, text).ids
        completion = self._completion(text, prompt, render_completion(text, answer, template))
        completion += [] if row.truncated else [self.tokenizer.eos_token_id]
        length = len(prompt) + len(completion)
        if not prompt:
            self.faults.add("empty prompt", row.origin, f"under {template!r}")
        elif not completion:
            self.faults.add("nothing to predict", row.origin, f"under {template!r}")
        elif length > self.max_length:
            self.faults.add("too long", row.origin, f"{length} tokens under {template!r}, the limit is {self.max_length}")
        else:
            return Example((*prompt, *completion), len(prompt), self.keeps_base, row.origin)
        return None

    def _completion(self, text: str, prompt: list[int], completion: str) -> list[int]:
        # As it goes on behind the prompt: by itself some tokenizers write a space before it. Where a token would reach from one
        # into the other, which the server never sees, it is encoded by itself.
        whole: list[int] = encode(self.tokenizer, text + completion).ids
        if prompt and whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        return list(encode(self.tokenizer, completion).ids)

    def write_pair(self, row: Row, template: Template) -> Pair | None:
        """Return the row's better and worse answer after its prompt; None where one is a fault, which is noted."""
        chosen = self.write(row, row.chosen, template)
        rejected = self.write(row, row.rejected, template) if chosen else None
        return Pair(chosen, rejected) if chosen and rejected else None

    def _prompt(self, row: Row, template: Template) -> str | None:
        try:
            return render_prompt(self.tokenizer, row.prompt, template)
        except TemplateError as error:
            if not self.tokenizer.chat_template:
                raise
            self.faults.add("chat template refuses", row.origin, str(error.__cause__))
        return None
