"""Statistics of the prompts that an adapter is for, measured on rows like those that it was trained on.

A row counts as much as the adapter raises the log-likelihood of its answer: rows that the adapter
does not change would attract prompts that are not its own.
"""

import logging
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lori.adapter import Adapter
from lori.base_model import BaseModel
from lori.gaussians import Array, Gaussians, fit_gaussian, joined
from lori.prompt_statistics import MAX_GAUSSIANS, STATISTICS_FILE, Background, PromptStatistics
from lori.store.files import replace_file
from training.data import DataError, Row
from training.evaluation.local_adapters import apply_adapter
from training.evaluation.local_answerer import row_log_likelihoods
from training.prompt_features import prompt_features

logger = logging.getLogger(__name__)

MAX_ROWS, MAX_ALL_ROWS = 800, 2400
"""Maximum number of rows of a form, and of all forms together unless each then had fewer than `MIN_ROWS`. So many are measured at
the end of a training; `training.calibrate` measures as many of a form by default."""
NUM_KINDS = 2
"""Kinds of prompts: plain ones, and messages."""
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


def forms_of(rows: Sequence[Row], seed: int) -> list[Form]:
    """Return the forms of the prompts in training data: a form of the plain prompts of each source, and one of its messages.

    Those with fewer than `MIN_ROWS` are pooled by kind; all are if there would be more forms than an adapter may have. A form has
    at most `MAX_ROWS` rows, drawn at random, and fewer if there are many forms. One with fewer than `MIN_ROWS` is left out.
    """
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[_kind(row), row.source].append(row)
    num_large = sum(len(group) >= MIN_ROWS for group in groups.values())
    forms: dict[str, list[Row]] = defaultdict(list)
    for (kind, source), group in groups.items():
        has_own = len(group) >= MIN_ROWS and num_large <= MAX_GAUSSIANS - NUM_KINDS
        forms[f"{kind} of {source}" if has_own else kind] += group
    rng = random.Random(seed)
    num_rows = max(MIN_ROWS, min(MAX_ROWS, MAX_ALL_ROWS // max(1, len(forms))))
    return [
        Form(name, rng.sample(form_rows, min(len(form_rows), num_rows)))
        for name, form_rows in forms.items()
        if len(form_rows) >= MIN_ROWS
    ]


def _kind(row: Row) -> str:
    return "plain prompts" if isinstance(row.prompt, str) else "messages"


def measure(base: BaseModel, adapter: Adapter, background: Background, forms: Sequence[Form]) -> PromptStatistics:
    """Return the statistics of the adapter's prompts, with a Gaussian for each form.

    Raises `DataError` if the adapter changes too few rows of a form.
    """
    gaussians = [_measure_form(base, adapter, background, form) for form in forms]
    return PromptStatistics(adapter.config.lori.content_digest, background.original_digest, joined(gaussians))


def measure_changed(base: BaseModel, adapter: Adapter, background: Background, forms: Sequence[Form]) -> PromptStatistics:
    """Return the statistics as `measure`, without the forms of which the adapter changes too few rows; the log names them.

    If it changes too few of each, their rows are pooled. Raises `DataError` if those are too few, too.
    """
    gaussians, faults = list[Gaussians](), list[str]()
    for form in forms:
        try:
            gaussians.append(_measure_form(base, adapter, background, form))
        except DataError as error:
            faults.append(str(error))
    if not gaussians:
        if len(forms) == 1:
            raise DataError(faults[0])
        pooled = [row for form in forms for row in form.rows]
        return measure(base, adapter, background, [Form("all prompts", pooled)])
    for fault in faults:
        logger.warning("left out of the statistics: %s", fault)
    return PromptStatistics(adapter.config.lori.content_digest, background.original_digest, joined(gaussians))


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
    templates = adapter.config.lori.templates
    with apply_adapter(base.model, adapter):
        adapted = row_log_likelihoods(base, rows, templates)
    plain = row_log_likelihoods(base, rows, templates)
    gains = np.array([own.total - other.total for own, other in zip(adapted, plain, strict=True)])
    return np.clip(gains / FULL_GAIN, 0, 1)
