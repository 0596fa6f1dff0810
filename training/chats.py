"""`python -m training.chats`: writes rows as people ask in a chat: with or without a system prompt, and after earlier turns.

An adapter that has seen nothing but bare prompts often answers nothing behind a system prompt or a greeting.
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
from training.command_line import CommandLine, ended
from training.data import DataError, Faults, OnBad, Row, Source, read_rows
from training.data.source import render

PROBE = "a prompt to try frames with"
FRAME_ERRORS = (TemplateError, TypeError, ValueError, ArithmeticError, LookupError)
"""What a Jinja template runs into."""
SYSTEM_PROMPTS = Path(__file__).with_name("system_prompts.txt")


class ChatsConfig(CommandLine):
    """Writes rows as people ask in a chat: with or without a system prompt, and after earlier turns."""

    data: list[Source]
    """Sources, as those of `training.fit`. Each row's prompt becomes the last message of a user; its other fields stay."""
    output: Path
    """The JSONL file to write, for `--data` of `training.fit`, `training.answer` and `training.evaluate`."""
    frames: Path | None = None
    """A file with a Jinja template a line, as a JSON string, over a row's `prompt`: each row is written in one drawn at random,
    such as `"Two things: {{ prompt }}, and what is 3 + 4?"`."""
    system_prompts: Path = SYSTEM_PROMPTS
    """A file with a system prompt a line."""
    earlier: list[Source] = Field(default=[])
    """Answered rows that stand before as earlier turns; those of `data` may be named, too. Conversations among them, and answers
    that were cut, are left out."""
    system_fraction: float = Field(default=0.5, ge=0, le=1)
    """The share of rows that get a system prompt."""
    earlier_fraction: float = Field(default=0.5, ge=0, le=1)
    """The share of rows that get earlier turns, where `earlier` has some."""
    max_earlier: int = Field(default=2, ge=1)
    """Most earlier turns, a question and its answer each."""
    num_rows: int = Field(default=0, ge=0)
    """How many rows of each source are taken, drawn at random; 0 is all."""
    seed: int = Field(default=0, ge=0)
    """Draws rows, frames, system prompts and earlier turns."""
    on_bad: OnBad = "refuse"
    """refuse: where a row cannot be used, nothing is written. skip: they are left out. Either way they are counted, and ten of
    each kind named, with their lines."""

    @model_validator(mode="after")
    def _keeps_data(self) -> "ChatsConfig":
        if any(Path(source.path).resolve() == self.output.resolve() for source in [*self.data, *self.earlier]):
            raise ValueError("--output is among --data or --earlier, whose rows would be lost")
        return self


def numbered_lines(file: Path) -> list[tuple[int, str]]:
    """Return the lines of a text file that are not empty, with their numbers from 1. Raise `DataError` where there are none."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"{file} has no line with text, expected one for each system prompt or frame")
    return lines


def frames_of(file: Path) -> list[str]:
    """Return the templates in `file`. Raises `DataError` where a line is no JSON string, or no Jinja template with the prompt."""
    frames = []
    for number, line in numbered_lines(file):
        try:
            frame = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}, line {number} is no JSON string: {error}") from error
        try:
            has_prompt = isinstance(frame, str) and PROBE in _asked(frame, PROBE).content
        except FRAME_ERRORS as error:
            raise DataError(f"{file}, line {number} is no Jinja template over the prompt: {error}") from error
        if not has_prompt:
            raise DataError(f"{file}, line {number}: expected a JSON string with {{{{ prompt }}}} in it, found {line[:80]}")
        frames.append(frame)
    return frames


def chats(config: ChatsConfig) -> list[dict[str, Any]]:
    """Return the rows of `config.data` as chats. Raises `DataError` for what is wrong with them, unless that is to be skipped."""
    faults = Faults(config.on_bad)
    rng = random.Random(config.seed)
    read = partial(read_rows, faults=faults)
    sources = [read(source, needs="prompt") for source in config.data]
    answered = [row for source in config.earlier for row in read(source)]
    faults.settle()
    earlier = [row for row in answered if isinstance(row.prompt, str) and not row.truncated]
    if answered and not earlier:
        raise DataError("--earlier has conversations and cut answers alone, expected prompts with whole answers")
    frames = frames_of(config.frames) if config.frames else []
    systems = [line for _, line in numbered_lines(config.system_prompts)]
    written = []
    for rows in sources:
        chosen = rng.sample(rows, config.num_rows) if 0 < config.num_rows < len(rows) else rows
        for row in chosen:
            asked = [Message(role="user", content=row.prompt)] if isinstance(row.prompt, str) else list(row.prompt)
            if frames:
                asked[-1] = _framed(row, rng.choice(frames), asked[-1].content)
            before = _before(rng, config, systems, earlier, row, has_system=asked[0].role == "system")
            kept = row.model_dump(exclude={"messages", "template", "prompt"}, exclude_unset=True)
            written.append({"prompt": [m.model_dump() for m in [*before, *asked]], **kept, "template": "chat"})
    return written


def _last(row: Row) -> str:
    return row.prompt if isinstance(row.prompt, str) else row.prompt[-1].content


def _asked(frame: str, prompt: str) -> Message:
    text = render(frame, {"prompt": prompt})
    text.encode()  # half a surrogate pair is a ValueError of one line
    return Message(role="user", content=text)


def _framed(row: Row, frame: str, prompt: str) -> Message:
    try:
        return _asked(frame, prompt)
    except FRAME_ERRORS as error:
        raise DataError(f"{row.origin}: the frame {frame[:80]!r} fails: {error}") from error


def _before(
    rng: random.Random, config: ChatsConfig, systems: Sequence[str], earlier: Sequence[Row], row: Row, *, has_system: bool
) -> list[Message]:
    if has_system:
        return []
    messages = []
    if rng.random() < config.system_fraction:
        messages.append(Message(role="system", content=rng.choice(systems)))
    if earlier and rng.random() < config.earlier_fraction:
        for turn in rng.choices(earlier, k=rng.randint(1, config.max_earlier)):
            assert isinstance(turn.prompt, str)
            assert turn.completion is not None
            if turn.prompt != _last(row):  # a row that stands before itself teaches to copy
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

    return ended(program)


if __name__ == "__main__":
    sys.exit(main())
