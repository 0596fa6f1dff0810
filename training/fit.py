"""`python -m training.fit`: trains a LoRI adapter as published (arXiv 2504.07448, section 3), and saves it.

Freeze the base; draw A from its seed; train all of B (LoRI-D); keep the largest tenth of |B| over all modules; set B to zero and
train only those entries on the same A (LoRI-S).
"""

import logging
import random
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from lori.adapter import Adapter
from lori.base_model import BaseModel
from lori.errors import LoriError
from lori.format import check_replaceable, save_adapter, write_record
from training.card import render_card
from training.config import FitConfig
from training.data import Example, Faults, Row, read_rows, tokenize
from training.methods import load_base, method_of
from training.processes import processes
from training.record import config_of
from training.run import Examples, Run

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a run: to learn, to mix in, to measure on; and what was wrong with others."""

    data: list[Row]
    mix: list[Row]
    held_out: list[Row]
    faults: Faults


def read_all(config: FitConfig) -> Rows:
    """Returns the rows of all sources. Raises `DataError` for what is wrong with them, unless that is to be skipped."""
    faults = Faults(config.on_bad)
    data, held_out = (
        [row for source in sources for row in read_rows(source, faults=faults)] for sources in (config.data, config.held_out)
    )
    mix = [row for source in config.mix for row in read_rows(source, needs="completion", faults=faults)]
    faults.settle()
    if config.held_out_fraction:
        random.Random(config.seed).shuffle(data)
        count = max(1, round(config.held_out_fraction * len(data)))
        data, held_out = data[count:], data[:count]
    return Rows(data, mix, held_out, faults)


def as_examples(rows: Rows, base: BaseModel, config: FitConfig) -> Examples:
    """Returns `rows` as tokens. Raises as `read_all` does."""

    def tokens(some: list[Row], keeps_base: bool = False) -> list[Example]:
        if not some:
            return []
        return tokenize(base.tokenizer, some, config.template, config.max_length, keeps_base, rows.faults)

    examples = Examples(tokens(rows.data), tokens(rows.mix, keeps_base=True), tokens(rows.held_out))
    rows.faults.settle()
    return examples


def fit(config: FitConfig, command: str) -> Path:
    """Trains and saves; returns the adapter's folder. Raises `LoriError`."""
    started = time.monotonic()
    if config.threads:
        torch.set_num_threads(config.threads)
    check_replaceable(config.output)
    rows = read_all(config)  # what is wrong with the data is said before the model is loaded
    base = load_base(config)
    run = Run(config, as_examples(rows, base, config))
    method = method_of(config, base)
    run.train(method)
    trained = method.trained()
    if processes().is_main_process:
        told = {"command": command, "seconds": round(time.monotonic() - started), "skipped": rows.faults.counts}
        record = config_of(config, base.identity, trained, run.outcomes, told)
        adapter = save_adapter(Adapter(config.output.name, record, *trained), config.output)
        write_record(config.output, adapter.config, render_card(adapter.name, adapter.config))
        run.close()
    processes().wait_for_everyone()
    return config.output


def main() -> int:
    """Runs the program and returns its exit code."""
    config = FitConfig.from_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        words = [word for word in sys.argv[1:] if word != "--resume"]
        folder = fit(config, shlex.join(["python", "-m", "training.fit", *words]))
    except LoriError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    if processes().is_main_process:
        print(f"saved {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
