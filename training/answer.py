"""`python -m training.answer`: the base model's own answers to prompts, as rows for `training.fit --mix`.

An adapter that is trained on its own task alone changes the output for every input. Mixing in the base model's answers to other
inputs teaches the adapter to leave those inputs alone. Only then does a merge keep what each of its adapters learned.
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
from training.command_line import CommandLine, run_program
from training.data import Faults, OnBad, Row, Source, read_rows
from training.evaluation.answerer import AnswerError, Sampling
from training.evaluation.local_answerer import DEFAULT_BATCH_TOKENS, LocalAnswerer
from training.evaluation.server_answerer import Server, ServerAnswerer

logger = logging.getLogger(__name__)
LOCAL_OPTIONS = ("model", "batch_tokens", "dtype", "threads")
SERVER_OPTIONS = ("api_key_variable", "concurrency")


class AnswerConfig(CommandLine):
    """Answer prompts with the base model itself and write the answers as rows for `training.fit --mix`."""

    data: list[Source]
    """Sources of the prompts to answer, as in `training.fit`. Their completions are ignored."""
    output: Path
    """The JSONL file to write."""
    url: HttpUrl | None = None
    """A running server whose base model answers. This is several times as fast as loading the model here."""
    api_key_variable: str = "LORI_API_KEY"
    """The environment variable with an API key of the server, if the server uses keys. With --url."""
    concurrency: int = Field(default=32, ge=1)
    """Number of concurrent requests. With --url."""
    model: str | None = None
    """The base model: a local folder or a hub id; the embedded model if absent."""
    template: Template = "chat"
    """The template that formats the prompts. Each row records it, since an answer is valid under its own template only."""
    on_bad: OnBad = "refuse"
    """refuse: write nothing if a row cannot be used or its prompt leaves no room for an answer. skip: leave such rows out. Either
    way bad rows are counted, and the first ten of each kind are listed with their lines."""
    only_unanswered: bool = False
    """Answers only the rows without a completion."""
    any_template: bool = False
    """Records no template in the rows, so that training uses each answer with all of its own templates."""
    num_rows: int = Field(default=0, ge=0)
    """Number of prompts of each source to answer, drawn at random; 0 means all."""
    max_tokens: int = Field(default=24, ge=1)
    """Maximum tokens of an answer. A longer answer is cut and marked `truncated`; training adds no end-of-text to it."""
    temperature: float = Field(default=0.7, ge=0)
    """1 samples from the base model's own distribution, 0 is greedy."""
    batch_tokens: int = Field(default=DEFAULT_BATCH_TOKENS, ge=1)
    """Tokens of a batch, answers included."""
    seed: int = Field(default=0, ge=0)
    """Seed for drawing the rows and sampling the answers."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of weights and matrix products: auto, bfloat16 or float32."""
    threads: int = Field(default=0, ge=0)
    """CPU threads; 0 means as many as there are CPUs that other processes leave idle."""

    @model_validator(mode="after")
    def _check_combinations(self) -> "AnswerConfig":
        unused_options = LOCAL_OPTIONS if self.url else SERVER_OPTIONS
        reason = "is for a model that is loaded here, and --url names a server" if self.url else "needs --url"
        if faults := [f"{flag_of(name)} {reason}" for name in unused_options if name in self.model_fields_set]:
            raise ValueError("; ".join(faults))
        return self

    @model_validator(mode="after")
    def _check_output(self) -> "AnswerConfig":
        if any(Path(source.path).resolve() == self.output.resolve() for source in self.data):
            raise ValueError("--output is among --data, whose answers would be lost")
        return self


def select_rows(config: AnswerConfig) -> list[Row]:
    """Return the rows to answer. Raises `DataError` for bad rows, unless `config.on_bad` is "skip"."""
    rows: list[Row] = []
    faults = Faults(config.on_bad)
    for source in config.data:
        source_rows = read_rows(source, needs="prompt", faults=faults)
        if config.only_unanswered:
            source_rows = [row for row in source_rows if not row.completion]
        if 0 < config.num_rows < len(source_rows):
            source_rows = random.Random(config.seed).sample(source_rows, config.num_rows)
        rows += source_rows
    faults.raise_or_warn()
    return rows


def answer_rows(base: BaseModel | None, rows: list[Row], config: AnswerConfig) -> list[dict[str, object]]:
    """Return each row with the base model's own completion. Empty answers are left out: an adapter would learn to be silent.

    `base` is None if the server at `config.url` answers. Raises `TemplateError` if a prompt cannot be formatted, `DataError` if
    prompts are empty or too long (unless `config.on_bad` is "skip"), and `AnswerError` if the server refuses a request.
    """
    sampling = Sampling(config.max_tokens, temperature=config.temperature, seed=config.seed)
    answerer: LocalAnswerer | ServerAnswerer
    if base is None:
        key = os.environ.get(config.api_key_variable)
        answerer = ServerAnswerer(Server(str(config.url), config.concurrency, key), template=config.template)
    else:
        answerer = LocalAnswerer(base.model, base.tokenizer, config.template, config.batch_tokens)
    rows = _rows_with_room(answerer, rows, config)
    template = None if config.any_template else config.template
    answered_rows = [
        row.with_completion(answer.text, template, truncated=not answer.is_whole)
        for row, answer in zip(rows, answerer.answers([row.prompt for row in rows], sampling), strict=True)
        if answer.text.strip()
    ]
    if num_empty := len(rows) - len(answered_rows):
        logger.info("empty answers left out: %d", num_empty)
    return answered_rows


def _rows_with_room(answerer: LocalAnswerer | ServerAnswerer, rows: list[Row], config: AnswerConfig) -> list[Row]:
    faults, prompted = Faults(config.on_bad), []
    for row in rows:
        if row.prompt_text or answerer.template != "plain":
            prompted.append(row)
        else:
            faults.add("empty prompt", row.origin)
    have_room = answerer.have_room([row.prompt for row in prompted], config.max_tokens)
    for row in (row for row, has_room in zip(prompted, have_room, strict=True) if not has_room):
        faults.add("too long", row.origin, f"with an answer of {config.max_tokens} tokens, for the model's context")
    faults.raise_or_warn()
    return [row for row, has_room in zip(prompted, have_room, strict=True) if has_room]


def write_answers(base: BaseModel | None, rows: list[Row], config: AnswerConfig) -> int:
    """Write the answers to `config.output` atomically and return their number. Raises as `answer_rows`."""
    lines = [json.dumps(row, ensure_ascii=False) for row in answer_rows(base, rows, config)]
    config.output.parent.mkdir(parents=True, exist_ok=True)
    replace_file(config.output, "".join(line + "\n" for line in lines).encode())
    return len(lines)


def main() -> int:
    """Run the program and return its exit code."""
    config = AnswerConfig.from_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # httpx logs each request at INFO

    def program() -> str:
        if config.output.exists():
            raise AnswerError(f"--output {config.output} is there already: remove it, or name another")
        rows = select_rows(config)  # before the model is loaded, so that bad rows are reported at once
        base = None if config.url else load_base(config.model, config.dtype, config.threads)
        num_answers = write_answers(base, rows, config)
        return f"wrote {num_answers} answers to {config.output}"

    return run_program(program)


if __name__ == "__main__":
    sys.exit(main())
