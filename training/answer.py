"""`python -m training.answer`: lets the base model answer prompts itself, in the form that `training.fit --mix` reads.

An adapter trained on its own task alone acts on every input. Mixing in the base model's own answers to other inputs teaches it
to leave those alone; merges keep what each adapter learned only then.
"""

import json
import logging
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from tqdm import tqdm

from lori.base_model import BaseModel, load_base_model, resolve_dtype
from lori.errors import LoriError
from lori.template import Template, encode, render_prompt
from training.command_line import CommandLine
from training.data import Row, Source, read_rows
from training.generation import Generation, end_ids, generate, until_end


class AnswerConfig(CommandLine):
    """Lets the base model answer prompts itself, in the form that `training.fit --mix` reads."""

    data: list[Source]
    """Sources, as those of `training.fit`, whose prompts are answered; what they say as completion is not read."""
    output: Path
    """The JSONL file to write."""
    model: str | None = None
    """The base model: a local folder or a hub id; the embedded model if absent."""
    template: Template = "chat"
    """How prompts are written; recorded in each row, since an answer is right under its own template only."""
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
    batch_size: int = Field(default=64, ge=1)
    """Prompts answered together."""
    seed: int = 0
    """Draws the rows and the answers."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Weights and products: auto, bfloat16 or float32."""
    threads: int = Field(default=0, ge=0)
    """CPU threads; 0 is torch's own choice."""


def chosen_rows(config: AnswerConfig) -> list[Row]:
    """Returns the rows to answer, shortest first so that a batch holds little padding."""
    rows: list[Row] = []
    for source in config.data:
        found = read_rows(source, needs="prompt")
        if config.only_unanswered:
            found = [row for row in found if not row.completion]
        if 0 < config.num_rows < len(found):
            found = random.Random(config.seed).sample(found, config.num_rows)
        rows += found
    return sorted(rows, key=lambda row: len(row.prompt_text))


def answers(base: BaseModel, rows: list[Row], config: AnswerConfig) -> Iterator[dict[str, object]]:
    """Yields each row with the base model's own completion, in the order of `rows`."""
    how = Generation(config.max_tokens, end_ids(base.model, base.tokenizer), config.temperature)
    for start in range(0, len(rows), config.batch_size):
        batch = rows[start : start + config.batch_size]
        prompts = [encode(base.tokenizer, render_prompt(base.tokenizer, row.prompt, config.template)).ids for row in batch]
        for row, found in zip(batch, generate(base.model, base.tokenizer.backend_tokenizer, prompts, how), strict=True):
            ids, ended = until_end(found, how)
            text = base.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)
            if not ended and not text.strip():
                continue
            template = None if config.any_template else config.template
            yield row.answered(text, template, truncated=not ended)


def main() -> int:
    """Runs the program and returns its exit code."""
    config = AnswerConfig.from_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        rows = chosen_rows(config)
        base = load_base_model(config.model, resolve_dtype(config.dtype))
    except LoriError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    torch.manual_seed(config.seed)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    num_answers = 0
    with config.output.open("w", encoding="utf-8") as file:
        for row in tqdm(answers(base, rows, config), total=len(rows), unit="row", disable=None):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            num_answers += 1
    print(f"wrote {num_answers} answers to {config.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
