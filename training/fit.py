"""`python -m training.fit`: trains a LoRI adapter as published (arXiv 2504.07448, section 3), and saves it.

Freeze the base; draw A from its seed; train all of B (LoRI-D); keep the largest tenth of |B| over all modules; set B to zero and
train only those entries on the same A (LoRI-S).
"""

import logging
import random
import shlex
import sys
import time
from pathlib import Path

import torch

from lori.adapter import Adapter
from lori.base_model import BaseModel
from lori.errors import LoriError
from lori.format import check_replaceable, save_adapter, write_record
from training.card import render_card
from training.config import FitConfig
from training.data import Row, read_rows, tokenize
from training.methods import load_base, method_of
from training.processes import processes
from training.record import config_of
from training.run import Examples, Run

logger = logging.getLogger(__name__)


def read_all(config: FitConfig) -> tuple[list[Row], list[Row], list[Row]]:
    """Returns the rows to learn, to mix in, and to measure on."""
    data = [row for source in config.data for row in read_rows(source)]
    held_out = [row for source in config.held_out for row in read_rows(source)]
    if config.held_out_fraction:
        random.Random(config.seed).shuffle(data)
        count = max(1, round(config.held_out_fraction * len(data)))
        data, held_out = data[count:], data[:count]
    return data, [row for source in config.mix for row in read_rows(source, needs="completion")], held_out


def load_examples(config: FitConfig, base: BaseModel) -> Examples:
    """Returns the rows of `read_all` as tokens."""
    learnt, kept, held_out = read_all(config)
    data = tokenize(base.tokenizer, learnt, config.template, config.max_length)
    mix = tokenize(base.tokenizer, kept, config.template, config.max_length, keeps_base=True) if kept else []
    return Examples(data, mix, tokenize(base.tokenizer, held_out, config.template, config.max_length) if held_out else [])


def fit(config: FitConfig, command: str) -> Path:
    """Trains and saves; returns the adapter's folder. Raises `DataError` or `LoriError`."""
    started = time.monotonic()
    if config.threads:
        torch.set_num_threads(config.threads)
    check_replaceable(config.output)
    read_all(config)  # What is wrong with the data is said before the model is loaded.
    base = load_base(config)
    run = Run(config, load_examples(config, base))
    method = method_of(config, base)
    run.train(method)
    trained = method.trained()
    if processes().is_main_process:
        told = {"command": command, "seconds": round(time.monotonic() - started)}
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
