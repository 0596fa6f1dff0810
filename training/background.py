"""`python -m training.background`: statistics of ordinary prompts, which are no adapter's, for a base model.

Requests with automatic weights need them: a prompt that fits no adapter clearly better than the background
is answered by the base.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import Field

from lori.base_model import BaseModel
from lori.gaussians import Array
from lori.prompt_statistics import (
    MAX_GAUSSIANS,
    MIN_LOG_ODDS,
    NUM_FEATURES,
    NUM_PROJECTED,
    Background,
    fit_background,
    load_background,
)
from lori.store.files import check_writable, replace_file
from training.base import RowsConfig, load_base
from training.command_line import run_program
from training.data import DataError, Faults, Row, Source, read_rows
from training.prompt_features import prompt_features

MIN_ROWS = 40
"""Fewer prompts of a source say too little about their kind."""
MIN_PROMPTS = 4 * NUM_FEATURES
"""Fewer prompts in all say too little about the covariance of the features."""


class BackgroundConfig(RowsConfig):
    """Measure ordinary prompts on a base model and write the background that automatic weights compare adapters with."""

    data: list[Source] = Field(min_length=1, max_length=MAX_GAUSSIANS)
    """Sources of prompts, as in `training.fit`: one for each kind, such as code, greetings, or messages in a language. Their
    completions are ignored."""
    output: Path
    """The file to write."""
    extend: Path | None = None
    """A background to extend: the output has its Gaussians, and one more for each source. Statistics of adapters that were made
    with it stay valid."""
    log_odds: float | None = Field(default=None, ge=MIN_LOG_ODDS, le=0)
    """Logarithm of the ratio of an adapter's prior probability to the base's: the higher, the more prompts go to adapters. The
    default is that of the extended background, else -7."""
    num_rows: int = Field(default=1500, ge=MIN_ROWS)
    """Maximum number of prompts of each source, drawn at random."""


def measure_background(config: BackgroundConfig) -> str:
    """Measure and write the background. Return a line that says what was written. Raises `LoriError` and `OSError`."""
    check_writable(config.output)  # before the measurement, not after
    faults = Faults(config.on_bad)
    kinds = [read_rows(source, needs="prompt", faults=faults) for source in config.data]
    faults.raise_or_warn()
    sizes = [(source.path, len(rows)) for source, rows in zip(config.data, kinds, strict=True)]
    if small := [f"{path} has {size} prompts" for path, size in sizes if size < MIN_ROWS]:
        raise DataError(f"{', '.join(small)}, expected at least {MIN_ROWS} of a kind")
    base = load_base(config.model, config.dtype, config.threads)
    drawn = [config.draw(rows, config.num_rows) for rows in kinds]
    background = _extended(base, config.extend, drawn) if config.extend else _fitted(base, drawn, config.num_rows)
    if config.log_odds is not None:
        background = replace(background, log_odds=config.log_odds)
    content = background.to_bytes()
    Background.from_bytes(str(config.output), content)  # raises for what a server would refuse
    replace_file(config.output, content)
    num_prompts, kinds_text = sum(map(len, drawn)), "1 kind" if len(drawn) == 1 else f"{len(drawn)} kinds"
    added = f" beside those of {config.extend}" if config.extend else ""
    return f"wrote {config.output}: {num_prompts} prompts of {kinds_text}{added}, {len(content)} bytes"


def _fitted(base: BaseModel, kinds: Sequence[Sequence[Row]], max_rows: int) -> Background:
    if (num_prompts := sum(map(len, kinds))) < MIN_PROMPTS:
        raise DataError(f"there are {num_prompts} prompts, at most {max_rows} of a source, expected {MIN_PROMPTS} in all")
    features = _features(base, kinds)
    _check_rank(features, base.model.config.get_text_config().hidden_size)
    return fit_background(base.identity.digest, features)


def _extended(base: BaseModel, file: Path, kinds: Sequence[Sequence[Row]]) -> Background:
    original = load_background(base.identity, file)
    if (excess := len(original.gaussians.means) + len(kinds) - MAX_GAUSSIANS) > 0:
        raise DataError(f"there are {len(kinds)} kinds, expected at most {len(kinds) - excess} beside those of {file}")
    return original.extended(_features(base, kinds))


def _features(base: BaseModel, kinds: Sequence[Sequence[Row]]) -> list[Array]:
    return [prompt_features(base, [row.prompt for row in rows]) for rows in kinds]


def _check_rank(features: Sequence[Array], width: int) -> None:
    # A base that is narrower than the projection gives its features fewer dimensions.
    everything = np.concatenate(features)
    rank, expected = np.linalg.matrix_rank(everything - everything.mean(0)), 2 * min(NUM_PROJECTED, width)
    if rank < expected:
        raise DataError(f"the covariance of the prompts' features is singular: it has rank {rank}, expected {expected}")


def main() -> int:
    """Run the program and return its exit code."""
    config = BackgroundConfig.from_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run_program(lambda: measure_background(config))


if __name__ == "__main__":
    sys.exit(main())
