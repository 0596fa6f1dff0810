"""`python -m training.calibrate`: statistics of the prompts that an adapter is for, in a file beside it.

A server needs them for requests with automatic weights (`"weights": "auto"`). They are measured on the base model alone. A row
counts as much as the adapter raises the log-likelihood of its completion: prompts on which the adapter does what the base does
would draw everybody's prompts. The adapter's version stays as it is.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import Field
from pydantic_settings import CliPositionalArg

from lori.adapter import Adapter
from lori.base_model import BaseModel
from lori.format import load_adapter
from lori.prompt_statistics import (
    STATISTICS_FILE,
    Array,
    Background,
    Gaussians,
    PromptStatistics,
    fit_gaussian,
    joined,
    load_background,
)
from lori.store.files import replace_file
from lori.template import Template
from training.base import load_base
from training.command_line import run_program
from training.data import DataError, Faults, Row, Source, read_rows
from training.evaluation.local_adapters import apply_adapter
from training.evaluation.local_answerer import LocalAnswerer
from training.prompt_features import PromptsConfig, prompt_features

MIN_ROWS = 80
"""Prompts of a source below which its statistics route badly."""
MIN_WEIGHT = 40
"""Sum of the rows' weights below which the same holds."""
FULL_GAIN = 2.0
"""Gain in log-likelihood, in nats for a whole completion, from which a row counts fully."""


class CalibrateConfig(PromptsConfig):
    """Measure the prompts that an adapter is for. The adapter's folder gets a file `prompt_statistics.safetensors`."""

    adapter: CliPositionalArg[Path]
    """The adapter's folder."""
    data: list[Source]
    """Rows like those that the adapter was trained on, with completions: one source for each form of prompts, such as plain
    prompts and messages."""
    background: Path | None = None
    """The base's background, see `python -m training.background`; by default the one that comes with the embedded model."""
    num_rows: int = Field(default=300, ge=MIN_ROWS)
    """Maximum number of rows of each source, drawn at random."""


def calibrate(config: CalibrateConfig) -> str:
    """Measure and write the statistics. Return a line that says what was written. Raises `LoriError`."""
    faults = Faults(config.on_bad)
    forms = [read_rows(source, faults=faults) for source in config.data]
    faults.raise_or_warn()
    for source, rows in zip(config.data, forms, strict=True):
        if len(rows) < MIN_ROWS:
            raise DataError(f"{source.path} has {len(rows)} rows, expected at least {MIN_ROWS} of a form of prompts")
    base = load_base(config.model, config.dtype, config.threads)
    adapter = load_adapter(config.adapter, base.identity)
    background = load_background(base.identity, config.background)
    drawn = [config.draw(rows, config.num_rows) for rows in forms]
    gaussians = [_measure(base, adapter, background, source.path, rows) for source, rows in zip(config.data, drawn, strict=True)]
    content = PromptStatistics(adapter.config.lori.content_digest, background.digest, joined(gaussians)).to_bytes()
    file = config.adapter / STATISTICS_FILE
    PromptStatistics.from_bytes(str(file), content)  # raises for what a server would refuse
    replace_file(file, content)
    return f"wrote {file}: {sum(map(len, drawn))} prompts in {len(drawn)} forms, {len(content)} bytes"


def _measure(base: BaseModel, adapter: Adapter, background: Background, source: str, rows: Sequence[Row]) -> Gaussians:
    """Return the Gaussian of the prompts of one form. Raises `DataError` if the adapter changes too few of them."""
    weights = _changes(base, adapter, rows)
    if (total := weights.sum()) < MIN_WEIGHT:
        cause = "the adapter raises the likelihood of too few completions"
        raise DataError(f"{source}: {len(rows)} rows count as {total:.1f}, expected at least {MIN_WEIGHT}: {cause}")
    return fit_gaussian(background.whiten(prompt_features(base, [row.prompt for row in rows])), weights)


def _changes(base: BaseModel, adapter: Adapter, rows: Sequence[Row]) -> Array:
    """Return how much each row counts (P,), 0 to 1: by the gain in log-likelihood that its completion has from the adapter."""
    row_templates = [_template(row, adapter.config.lori.templates) for row in rows]
    gains = np.zeros(len(rows))
    for template in sorted({*row_templates}):
        chosen = [i for i, own in enumerate(row_templates) if own == template]
        texts = [(rows[i].prompt, rows[i].completion or "") for i in chosen]
        answerer = LocalAnswerer(base.model, base.tokenizer, template)
        with apply_adapter(base.model, adapter):
            adapted = answerer.log_likelihoods(texts)
        plain = answerer.log_likelihoods(texts)
        gains[chosen] = [own.total - other.total for own, other in zip(adapted, plain, strict=True)]
    return np.clip(gains / FULL_GAIN, 0, 1)


def _template(row: Row, templates: Sequence[Template]) -> Template:
    """Return the template under which a row is measured: its own, else plain prompts as they stand if the adapter knows that.

    Raises `DataError` if the adapter does not know the row's own.
    """
    if row.template and row.template not in templates:
        raise DataError(f"{row.origin} has the template {row.template!r}, expected one of the adapter's: {', '.join(templates)}")
    preferred: Template = "plain" if isinstance(row.prompt, str) else "chat"
    return row.template or (preferred if preferred in templates else templates[0])


def main() -> int:
    """Run the program and return its exit code."""
    config = CalibrateConfig.from_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run_program(lambda: calibrate(config))


if __name__ == "__main__":
    sys.exit(main())
