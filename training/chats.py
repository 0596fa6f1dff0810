"""`python -m training.chats`: rows as chats, with or without a system prompt, and after earlier turns.

An adapter that is trained on bare prompts alone often gives an empty answer after a system prompt or a greeting.
"""

import json
import logging
import random
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from pydantic import Field, model_validator

from lori.store.files import replace_file
from lori.template import Message
from training.command_line import CommandLine, run_program
from training.data import DataError, Faults, OnBad, Row, Source, read_rows
from training.data.source import render

PROBE = "a prompt to try frames with"
FRAME_ERRORS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError)
"""Exceptions that rendering a Jinja template may raise."""
SYSTEM_PROMPTS = Path(__file__).with_name("system_prompts.txt")


class ChatsConfig(CommandLine):
    """Write rows as chats: with or without a system prompt, and after earlier turns."""

    data: list[Source]
    """Sources of rows, as in `training.fit`. Each row's prompt becomes the last user message; its other fields stay."""
    output: Path
    """The JSONL file to write, for `--data` of `training.fit`, `training.answer` and `training.evaluate`."""
    frames: Path | None = None
    """A file of Jinja templates over a row's `prompt`, one JSON string a line, such as
    `"Two things: {{ prompt }}, and what is 3 + 4?"`. Each row's prompt is rendered in one that is drawn at random."""
    system_prompts: Path = SYSTEM_PROMPTS
    """A file of system prompts, one a line."""
    earlier: list[Source] = Field(default=[])
    """Sources of answered rows, which become earlier turns of the chats. They may include those of `data`. Rows that are
    conversations themselves, and rows with truncated answers, are left out."""
    system_fraction: float = Field(default=0.5, ge=0, le=1)
    """Fraction of rows that get a system prompt."""
    earlier_fraction: float = Field(default=0.5, ge=0, le=1)
    """Fraction of rows that get earlier turns, if `earlier` is given."""
    max_earlier: int = Field(default=2, ge=1)
    """Maximum number of earlier turns; a turn is a question and its answer."""
    num_rows: int = Field(default=0, ge=0)
    """Number of rows of each source to use, drawn at random; 0 means all."""
    seed: int = Field(default=0, ge=0)
    """Seed for drawing rows, frames, system prompts and earlier turns."""
    on_bad: OnBad = "refuse"
    """refuse: write nothing if a row cannot be used. skip: leave such rows out. Either way bad rows are counted, and the first
    ten of each kind are listed with their lines."""

    @model_validator(mode="after")
    def _check_output(self) -> "ChatsConfig":
        if any(Path(source.path).resolve() == self.output.resolve() for source in [*self.data, *self.earlier]):
            raise ValueError("--output is among --data or --earlier, whose rows would be lost")
        return self


def numbered_lines(file: Path) -> list[tuple[int, str]]:
    """Return the nonempty lines of a text file with their numbers, from 1. Raises `DataError` if there are none."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"{file} has no line with text, expected one for each system prompt or frame")
    return lines


def read_frames(file: Path) -> list[str]:
    """Return the templates in `file`. Raises `DataError` if a line is not a JSON string with a Jinja template of the prompt."""
    frames = []
    for number, line in numbered_lines(file):
        try:
            frame = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}, line {number} is no JSON string: {error}") from error
        try:
            has_prompt = isinstance(frame, str) and PROBE in _framed_message(frame, PROBE).content
        except FRAME_ERRORS as error:
            raise DataError(f"{file}, line {number} is no Jinja template over the prompt: {error}") from error
        if not has_prompt:
            raise DataError(f"{file}, line {number}: expected a JSON string with {{{{ prompt }}}} in it, found {line[:80]}")
        frames.append(frame)
    return frames


def chats(config: ChatsConfig) -> list[dict[str, Any]]:
    """Return the rows of `config.data` as chats. Raises `DataError` for bad rows, unless `config.on_bad` is "skip"."""
    faults = Faults(config.on_bad)
    rng = random.Random(config.seed)
    read = partial(read_rows, faults=faults)
    sources = [read(source, needs="prompt") for source in config.data]
    answered_rows = [row for source in config.earlier for row in read(source)]
    faults.raise_or_warn()
    earlier = [row for row in answered_rows if isinstance(row.prompt, str) and not row.truncated]
    if answered_rows and not earlier:
        raise DataError("--earlier has conversations and cut answers alone, expected prompts with whole answers")
    frames = read_frames(config.frames) if config.frames else []
    system_prompts = [line for _, line in numbered_lines(config.system_prompts)]
    result = []
    for rows in sources:
        chosen = rng.sample(rows, config.num_rows) if 0 < config.num_rows < len(rows) else rows
        for row in chosen:
            messages = [Message(role="user", content=row.prompt)] if isinstance(row.prompt, str) else list(row.prompt)
            if frames:
                messages[-1] = _apply_frame(row, rng.choice(frames), messages[-1].content)
            context = _draw_context(rng, config, system_prompts, earlier, row, has_system=messages[0].role == "system")
            other_fields = row.model_dump(exclude={"messages", "template", "prompt"}, exclude_unset=True)
            result.append({"prompt": [m.model_dump() for m in [*context, *messages]], **other_fields, "template": "chat"})
    return result


def _last_message(row: Row) -> str:
    return row.prompt if isinstance(row.prompt, str) else row.prompt[-1].content


def _framed_message(frame: str, prompt: str) -> Message:
    text = render(frame, {"prompt": prompt})
    text.encode()  # raises a ValueError with a one-line message for a lone surrogate
    return Message(role="user", content=text)


def _apply_frame(row: Row, frame: str, prompt: str) -> Message:
    try:
        return _framed_message(frame, prompt)
    except FRAME_ERRORS as error:
        raise DataError(f"{row.origin}: the frame {frame[:80]!r} fails: {error}") from error


def _draw_context(
    rng: random.Random, config: ChatsConfig, system_prompts: Sequence[str], earlier: Sequence[Row], row: Row, *, has_system: bool
) -> list[Message]:
    """Return a system prompt and earlier turns for `row`, drawn at random. Empty if the row has a system prompt of its own."""
    if has_system:
        return []
    messages = []
    if rng.random() < config.system_fraction:
        messages.append(Message(role="system", content=rng.choice(system_prompts)))
    if earlier and rng.random() < config.earlier_fraction:
        for turn in rng.choices(earlier, k=rng.randint(1, config.max_earlier)):
            assert isinstance(turn.prompt, str)
            assert turn.completion is not None
            if turn.prompt != _last_message(row):  # with its own question and answer before it, a row would teach copying
                messages += [
                    Message(role="user", content=turn.prompt),
                    Message(role="assistant", content=turn.completion.strip()),
                ]
    return messages


def main() -> int:
    """Run the program and return its exit code."""
    config = ChatsConfig.from_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def program() -> str:
        if config.output.exists():
            raise DataError(f"--output {config.output} is there already: remove it, or name another")
        rows = chats(config)
        config.output.parent.mkdir(parents=True, exist_ok=True)
        replace_file(config.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        return f"wrote {len(rows)} rows to {config.output}"

    return run_program(program)


if __name__ == "__main__":
    sys.exit(main())
