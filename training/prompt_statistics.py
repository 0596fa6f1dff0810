"""Statistics of the prompts that an adapter is for, measured on rows like those that it was trained on.

A row counts as much as the adapter raises the log-likelihood of its answer: rows that the adapter
does not change would attract prompts that are not its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lori.adapter import Adapter
from lori.base_model import BaseModel
from lori.prompt_statistics import STATISTICS_FILE, Array, Background, Gaussians, PromptStatistics, fit_gaussian, joined
from lori.store.files import replace_file
from lori.template import Template
from training.data import DataError, Row
from training.evaluation.local_adapters import apply_adapter
from training.evaluation.local_answerer import LocalAnswerer
from training.prompt_features import prompt_features

MIN_ROWS = 80
"""Prompts of a form below which its statistics route badly."""
MIN_WEIGHT = 40
"""Sum of the rows' weights below which the same holds."""
FULL_GAIN = 2.0
"""Gain in log-likelihood, in nats for a whole answer, from which a row counts fully."""


@dataclass(frozen=True, slots=True)
class Form:
    """Rows whose prompts have one form, such as plain prompts, or messages."""

    source: str
    rows: Sequence[Row]

    def check_size(self) -> None:
        """Raise `DataError` if there are too few rows for statistics."""
        if len(self.rows) < MIN_ROWS:
            raise DataError(f"{self.source} has {len(self.rows)} rows, expected at least {MIN_ROWS} of a form of prompts")


def measure(base: BaseModel, adapter: Adapter, background: Background, forms: Sequence[Form]) -> PromptStatistics:
    """Return the statistics of the adapter's prompts, with a Gaussian for each form.

    Raises `DataError` if the adapter changes too few rows of a form.
    """
    gaussians = [_measure_form(base, adapter, background, form) for form in forms]
    return PromptStatistics(adapter.config.lori.content_digest, background.digest, joined(gaussians))


def write_statistics(folder: Path, statistics: PromptStatistics) -> str:
    """Write the statistics beside the adapter in `folder`, and return what was written. Raises what a reader of it would."""
    file, content = folder / STATISTICS_FILE, statistics.to_bytes()
    PromptStatistics.from_bytes(str(file), content)
    replace_file(file, content)
    return f"{file}, {len(content)} bytes"


def _measure_form(base: BaseModel, adapter: Adapter, background: Background, form: Form) -> Gaussians:
    weights = _changes(base, adapter, form.rows)
    if (total := weights.sum()) < MIN_WEIGHT:
        cause = "the adapter raises the likelihood of too few answers"
        raise DataError(f"{form.source}: {len(form.rows)} rows count as {total:.1f}, expected at least {MIN_WEIGHT}: {cause}")
    return fit_gaussian(background.whiten(prompt_features(base, [row.prompt for row in form.rows])), weights)


def _changes(base: BaseModel, adapter: Adapter, rows: Sequence[Row]) -> Array:
    """Return how much each row counts (P,), 0 to 1: by the gain in log-likelihood that its answer has from the adapter."""
    row_templates = [_template(row, adapter.config.lori.templates) for row in rows]
    gains = np.zeros(len(rows))
    for template in sorted({*row_templates}):
        chosen = [i for i, own in enumerate(row_templates) if own == template]
        texts = [(rows[i].prompt, rows[i].completion or rows[i].chosen or "") for i in chosen]
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
