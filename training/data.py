"""Reads training data and writes it as tokens. Knows files, rows and templates; nothing of models or steps.

A row is `prompt` and `completion`, or `messages` whose last one is the assistant's. `template` in a row overrides the run's.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from transformers import PreTrainedTokenizerBase

from lori.errors import LoriError
from lori.template import Message, Template, Text, encode, render_completion, render_prompt

logger = logging.getLogger(__name__)


class DataError(LoriError):
    """The data cannot be used: says which file and line, what was found and what was expected."""


class Row(BaseModel):
    """One example. Fields that training does not read (a label, a licence) are kept for whoever does."""

    model_config = ConfigDict(extra="allow")

    prompt: Text | list[Message] = ""
    completion: Text | None = None
    messages: list[Message] | None = None
    template: Template | None = None
    truncated: bool = False

    @model_validator(mode="after")
    def _one_form(self) -> "Row":
        if self.messages is not None:
            if self.prompt or self.completion is not None:
                raise ValueError("has both 'messages' and 'prompt' or 'completion', expected one form")
            if len(self.messages) < 2 or self.messages[-1].role != "assistant":
                raise ValueError("'messages' must end with an assistant's message after at least one other")
            self.prompt, self.completion, self.messages = self.messages[:-1], self.messages[-1].content, None
        if not self.prompt:
            raise ValueError("has no 'prompt' and no 'messages'")
        if self.truncated and not self.completion:
            raise ValueError("is 'truncated' and has no completion")
        return self

    @property
    def prompt_text(self) -> str:
        """The prompt as one string, for sorting and messages."""
        return self.prompt if isinstance(self.prompt, str) else "\n".join(m.content for m in self.prompt)

    def answered(self, completion: str, template: Template | None, truncated: bool) -> dict[str, Any]:
        """Returns this row as a JSON object with another completion, right under `template`, or under any."""
        prompt = self.prompt if isinstance(self.prompt, str) else [m.model_dump() for m in self.prompt]
        return {"prompt": prompt, "completion": completion, "template": template, "truncated": truncated}


@dataclass(frozen=True, slots=True)
class Example:
    """One example as tokens: the loss is on `ids[num_prompt:]`.

    An example that `keeps_base` is not learnt: there the adapted model is held to the base model's own distribution.
    """

    ids: tuple[int, ...]
    num_prompt: int
    keeps_base: bool = False

    def __len__(self) -> int:
        return len(self.ids)


def read_rows(source: str, needs: Literal["text", "completion", "prompt"] = "text", kind: type[Row] = Row) -> list[Row]:
    """Reads a JSONL file, or the `train` split of a hub data set where no such file exists.

    `needs` is what a row must have beside its prompt: a completion with text in it, any completion (the base model may answer
    nothing), or no completion. Rows without it are left out and counted; what is no row of `kind` is bad. Raises `DataError` with
    every bad line's number.
    """
    objects = _read_jsonl(Path(source)) if Path(source).is_file() else _read_hub(source)
    rows, faults, num_without = [], [], 0
    for number, found in objects:
        try:
            row = kind.model_validate(found)
        except ValidationError as error:
            faults.append(f"line {number}: " + "; ".join(_say(e) for e in error.errors()))
            continue
        if (needs == "text" and not row.completion) or (needs == "completion" and row.completion is None):
            num_without += 1
            continue
        rows.append(row)
    if faults:
        raise DataError(f"{source} has {len(faults)} bad rows: " + " | ".join(faults[:10]))
    if num_without:
        logger.warning("%s: %d rows without a completion are left out", source, num_without)
    if not rows:
        raise DataError(f"{source} has no usable row: expected 'prompt' and 'completion', or 'messages', in each")
    return rows


def _say(error: Any) -> str:
    where = ".".join(map(str, error["loc"]))
    return f"{where}: {error['msg']}" if where else error["msg"].removeprefix("Value error, ")


def _read_jsonl(path: Path) -> list[tuple[int, Any]]:
    objects, faults = [], []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                objects.append((number, json.loads(line)))
            except (json.JSONDecodeError, RecursionError) as error:
                faults.append(f"line {number}: not JSON ({error})")
    if faults:
        raise DataError(f"{path} has {len(faults)} bad lines: " + " | ".join(faults[:10]))
    return objects


def _read_hub(name: str) -> list[tuple[int, Any]]:
    if Path(name).suffix in (".json", ".jsonl") or name.startswith((".", "/")) or Path(name).exists():
        raise DataError(f"there is no file {name!r}")
    try:
        from datasets import load_dataset  # noqa: PLC0415  # an extra; reading a file must not need it
    except ImportError as error:
        raise DataError(f"{name!r} is no file, and hub data sets need: pip install '.[train]'") from error
    try:
        return list(enumerate(load_dataset(name, split="train"), 1))
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{name!r} is neither a file nor a hub data set that can be loaded: {error}") from error


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    templates: Sequence[Template],
    max_length: int,
    keeps_base: bool = False,
) -> list[Example]:
    """Returns each row as tokens: rendered prompt, completion, end-of-text (but for a truncated completion).

    A row that names no template of its own gives an example under each of `templates`. The prompt is encoded by itself, as the
    server encodes it. Examples longer than `max_length` tokens are left out and counted, and those with nothing to predict.
    """
    examples, num_long, num_empty = [], 0, 0
    for row in rows:
        for template in [row.template] if row.template else templates:
            assert row.completion is not None
            text = render_prompt(tokenizer, row.prompt, template)
            prompt = encode(tokenizer, text).ids
            completion = encode(tokenizer, render_completion(text, row.completion, template)).ids
            completion += [] if row.truncated else [tokenizer.eos_token_id]
            num_empty += not completion
            num_long += len(prompt) + len(completion) > max_length
            if completion and len(prompt) + len(completion) <= max_length:
                examples.append(Example((*prompt, *completion), len(prompt), keeps_base))
    if num_long or num_empty:
        logger.warning("left out: %d examples longer than %d tokens, %d with an empty answer", num_long, max_length, num_empty)
    if not examples:
        raise DataError(f"no example is left: {num_long} are longer than {max_length} tokens, {num_empty} have an empty answer")
    return examples
