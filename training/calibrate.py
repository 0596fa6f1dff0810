"""`python -m training.calibrate`: statistics of the prompts that an adapter is for, in a file beside it.

A server needs them for requests with automatic weights (`"weights": "auto"`). `training.fit` makes them itself; this program is
for adapters that came without, and for forms of prompts that were not in the training data. The adapter's version stays as it is.
"""

import logging
import sys
from pathlib import Path
from typing import ClassVar

from pydantic import Field
from pydantic_settings import CliPositionalArg

from lori.format import load_adapter
from lori.prompt_statistics import MAX_GAUSSIANS, STATISTICS_FILE, load_background
from lori.store.files import check_writable
from training.base import RowsConfig, load_base
from training.command_line import run_program
from training.data import Faults, Source, read_rows
from training.prompt_statistics import MAX_ROWS, MIN_ROWS, Form, measure, write_statistics


class CalibrateConfig(RowsConfig):
    """Measure the prompts that an adapter is for. The adapter's folder gets a file `prompt_statistics.safetensors`."""

    USAGE: ClassVar[str] = "ADAPTER [--FLAG VALUE ...]"

    adapter: CliPositionalArg[Path]
    """The adapter's folder."""
    data: list[Source] = Field(min_length=1, max_length=MAX_GAUSSIANS)
    """Rows like those that the adapter was trained on, with completions: one source for each form of prompts, such as plain
    prompts and messages."""
    background: Path | None = None
    """The base's background, see `python -m training.background`; by default the one that comes with the embedded model."""
    num_rows: int = Field(default=MAX_ROWS, ge=MIN_ROWS)
    """Maximum number of rows of each source, drawn at random."""


def calibrate(config: CalibrateConfig) -> str:
    """Measure and write the statistics. Return a line that says what was written. Raises `LoriError` and `OSError`."""
    check_writable(config.adapter / STATISTICS_FILE)  # before the measurement, not after
    faults = Faults(config.on_bad)
    forms = [Form(source.path, config.draw(read_rows(source, faults=faults), config.num_rows)) for source in config.data]
    faults.raise_or_warn()
    for form in forms:
        form.check_size()
    base = load_base(config.model, config.dtype, config.threads)
    adapter = load_adapter(config.adapter, base.identity)
    statistics = measure(base, adapter, load_background(base.identity, config.background), forms)
    written = write_statistics(config.adapter, statistics)
    num_prompts, forms_text = sum(len(form.rows) for form in forms), "form" if len(forms) == 1 else "forms"
    return f"wrote {written}: {num_prompts} prompts in {len(forms)} {forms_text}"


def main() -> int:
    """Run the program and return its exit code."""
    config = CalibrateConfig.from_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run_program(lambda: calibrate(config))


if __name__ == "__main__":
    sys.exit(main())
