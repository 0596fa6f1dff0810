"""`python -m training.answer`: lets the base model answer prompts itself, in the form that `training.fit --mix` reads.

An adapter trained on its own task alone acts on every input. Mixing in the base model's own answers to other inputs teaches it
to leave those alone; merges keep what each adapter learned only then.
"""

import json
import logging
import os
import random
import sys
from pathlib import Path
from typing import Literal

from pydantic import Field, HttpUrl, model_validator

from lori.base_model import BaseModel
from lori.flags import flag_of
from lori.store.files import replace_file
from lori.template import Template
from training.base import load_base
from training.command_line import CommandLine, ended
from training.data import Faults, OnBad, Row, Source, read_rows
from training.evaluation.answerer import AnswerError, Sampling
from training.evaluation.local_answerer import DEFAULT_BATCH_TOKENS, LocalAnswerer
from training.evaluation.server_answerer import Server, ServerAnswerer

logger = logging.getLogger(__name__)
LOCAL = ("model", "batch_tokens", "dtype", "threads")
SERVED = ("api_key_variable", "concurrency")


class AnswerConfig(CommandLine):
    """Lets the base model answer prompts itself, in the form that `training.fit --mix` reads."""

    data: list[Source]
    """Sources, as those of `training.fit`, whose prompts are answered; what they say as completion is not read."""
    output: Path
    """The JSONL file to write."""
    url: HttpUrl | None = None
    """A running server whose base model answers, several times as fast as one that is loaded here."""
    api_key_variable: str = "LORI_API_KEY"
    """The variable of the environment that holds a key of the server, where it has keys. With --url."""
    concurrency: int = Field(default=32, ge=1)
    """Requests under way together. With --url."""
    model: str | None = None
    """The base model: a local folder or a hub id; the embedded model if absent."""
    template: Template = "chat"
    """How prompts are written; recorded in each row, since an answer is right under its own template only."""
    on_bad: OnBad = "refuse"
    """refuse: where a row cannot be used, or its prompt leaves no room for an answer, nothing is written. skip: they are left
    out. Either way they are counted, and ten of each kind named, with their lines."""
    only_unanswered: bool = False
    """Answers only rows that have no completion of their own."""
    any_template: bool = False
    """Leaves the template out of the rows, so that training writes the answer under each of its own templates."""
    num_rows: int = Field(default=0, ge=0)
    """How many prompts of each file are answered, drawn at random; 0 is all."""
    max_tokens: int = Field(default=24, ge=1)
    """Longest answer; one cut here is marked `truncated`, and no end-of-text is trained after it."""
    temperature: float = Field(default=0.7, ge=0)
    """1 draws from the base model as it is, 0 is greedy."""
    batch_tokens: int = Field(default=DEFAULT_BATCH_TOKENS, ge=1)
    """Tokens, answers included, that are computed together."""
    seed: int = Field(default=0, ge=0)
    """Draws the rows and the answers."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Weights and products: auto, bfloat16 or float32."""
    threads: int = Field(default=0, ge=0)
    """CPU threads; 0 is as many as there are CPUs that other processes leave free."""

    @model_validator(mode="after")
    def _goes_together(self) -> "AnswerConfig":
        idle = LOCAL if self.url else SERVED
        whose = "is for a model that is loaded here, and --url names a server" if self.url else "needs --url"
        if faults := [f"{flag_of(name)} {whose}" for name in idle if name in self.model_fields_set]:
            raise ValueError("; ".join(faults))
        return self

    @model_validator(mode="after")
    def _keeps_data(self) -> "AnswerConfig":
        if any(Path(source.path).resolve() == self.output.resolve() for source in self.data):
            raise ValueError("--output is among --data, whose answers would be lost")
        return self


def chosen_rows(config: AnswerConfig) -> list[Row]:
    """Return the rows to answer. Raises `DataError` for what is wrong with them, unless that is to be skipped."""
    rows: list[Row] = []
    faults = Faults(config.on_bad)
    for source in config.data:
        found = read_rows(source, needs="prompt", faults=faults)
        if config.only_unanswered:
            found = [row for row in found if not row.completion]
        if 0 < config.num_rows < len(found):
            found = random.Random(config.seed).sample(found, config.num_rows)
        rows += found
    faults.settle()
    return rows


def answers(base: BaseModel | None, rows: list[Row], config: AnswerConfig) -> list[dict[str, object]]:
    """Return each row with the base model's own completion, without those that were cut before they said anything.

    `base` is None where the server at `config.url` answers. Raises `TemplateError` where a prompt cannot be written, `DataError`
    where some are empty or too long, unless that is to be skipped, and `AnswerError` where the server refuses one.
    """
    how = Sampling(config.max_tokens, temperature=config.temperature, seed=config.seed)
    who: LocalAnswerer | ServerAnswerer
    if base is None:
        key = os.environ.get(config.api_key_variable)
        who = ServerAnswerer(Server(str(config.url), config.concurrency, key), template=config.template)
    else:
        who = LocalAnswerer(base.model, base.tokenizer, config.template, config.batch_tokens)
    rows = _with_room(who, rows, config)
    template = None if config.any_template else config.template
    found = [
        row.answered(answer.text, template, truncated=not answer.is_whole)
        for row, answer in zip(rows, who.answers([row.prompt for row in rows], how), strict=True)
        if answer.is_whole or answer.text.strip()
    ]
    if num_left := len(rows) - len(found):
        logger.info("answers left out, which --max-tokens cut before they said anything: %d", num_left)
    return found


def _with_room(who: LocalAnswerer | ServerAnswerer, rows: list[Row], config: AnswerConfig) -> list[Row]:
    faults, some = Faults(config.on_bad), []
    for row in rows:
        if row.prompt_text or who.template != "plain":
            some.append(row)
        else:
            faults.add("empty prompt", row.origin)
    have_room = who.have_room([row.prompt for row in some], config.max_tokens)
    for row in (row for row, has_room in zip(some, have_room, strict=True) if not has_room):
        faults.add("too long", row.origin, f"with an answer of {config.max_tokens} tokens, for the model's context")
    faults.settle()
    return [row for row, has_room in zip(some, have_room, strict=True) if has_room]


def write_answers(base: BaseModel | None, rows: list[Row], config: AnswerConfig) -> int:
    """Write the answers to `config.output`, all or nothing, and return how many there are. Raises as `answers`."""
    lines = [json.dumps(row, ensure_ascii=False) for row in answers(base, rows, config)]
    config.output.parent.mkdir(parents=True, exist_ok=True)
    replace_file(config.output, "".join(line + "\n" for line in lines).encode())
    return len(lines)


def main() -> int:
    """Run the program and return its exit code."""
    config = AnswerConfig.from_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request else

    def program() -> str:
        if config.output.exists():
            raise AnswerError(f"--output {config.output} is there already: remove it, or name another")
        rows = chosen_rows(config)  # what is wrong with them is said before the model is loaded
        base = None if config.url else load_base(config.model, config.dtype, config.threads)
        num_answers = write_answers(base, rows, config)
        return f"wrote {num_answers} answers to {config.output}"

    return ended(program)


if __name__ == "__main__":
    sys.exit(main())
