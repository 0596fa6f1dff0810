"""`python -m training.fit`: trains a LoRI adapter as published (arXiv 2504.07448, section 3), and saves it.

Freeze the base; draw A from its seed; train all of B (LoRI-D); keep the largest tenth of |B| over all modules; set B to zero and
train only those entries on the same A (LoRI-S).
"""

import logging
import os
import random
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lori.adapter import Adapter
from lori.base_model import BaseModel
from lori.errors import LoriError
from lori.format import check_replaceable, write_record
from lori.identity import BaseIdentity
from lori.store.store import AdapterStore
from training.base import load_base
from training.command_line import ended
from training.config import FitConfig
from training.data import DataError, Faults, Item, Needs, Row, read_rows, tokenize, tokenize_pairs
from training.methods import TrainingMethod, method_of
from training.packing import ATTENTION, check_layers, max_example
from training.phase import Outcome
from training.processes import processes
from training.progress import check_tensorboard
from training.record import config_of, render_card
from training.run import Examples, Run, begin, has_ended
from training.samples import Sample, take_samples

logger = logging.getLogger(__name__)

ReportWriter = Callable[[Path, Adapter, Mapping[str, Outcome], Sequence[Sample]], None]


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a run: to learn, to mix in, to measure on; and what was wrong with others."""

    data: list[Row]
    mix: list[Row]
    held_out: list[Row]
    faults: Faults


def read_all(config: FitConfig) -> Rows:
    """Return the rows of all sources. Raises `DataError` for what is wrong with them, unless that is to be skipped."""
    faults = Faults(config.on_bad)
    needs: Needs = "preference" if config.loss == "dpo" else "text"
    data, held_out = (
        [row for source in sources for row in read_rows(source, needs, faults)] for sources in (config.data, config.held_out)
    )
    mix = [row for source in config.mix for row in read_rows(source, needs="completion", faults=faults)]
    faults.settle()
    if config.held_out_fraction:
        random.Random(config.seed).shuffle(data)
        count = max(1, round(config.held_out_fraction * len(data)))
        data, held_out = data[count:], data[:count]
        if not data:
            raise DataError(f"--held-out-fraction {config.held_out_fraction:g} leaves nothing to learn: there are {count} rows")
    return Rows(data, mix, held_out, faults)


def as_examples(rows: Rows, base: BaseModel, config: FitConfig) -> Examples:
    """Return `rows` as tokens. Raises as `read_all` does, and `ModelError` for layers that `check_layers` does not know."""
    layers = base.model.config.get_text_config()
    check_layers(layers)
    max_length = min(config.max_length, max_example(layers) or config.max_length)

    def tokens(some: list[Row], keeps_base: bool = False) -> Sequence[Item]:
        if not some:
            return []
        if config.loss == "dpo":
            return tokenize_pairs(base.tokenizer, some, config.template, max_length, rows.faults)
        return tokenize(base.tokenizer, some, config.template, max_length, keeps_base, rows.faults)

    examples = Examples(tokens(rows.data), tokens(rows.mix, keeps_base=True), tokens(rows.held_out))
    rows.faults.settle()
    return examples


def fit(config: FitConfig, command: str) -> Path:
    """Train and saves; returns the adapter's folder. Raises `LoriError`."""
    started = time.monotonic()
    check_replaceable(config.output)
    if config.fsdp and processes().num_processes == 1:
        raise LoriError("--fsdp spreads the base over processes, and there is one: torchrun --nproc-per-node 2 -m training.fit …")
    if config.resume and has_ended(config):
        logger.warning("%s is there, and no run to go on with; without --resume it is trained anew", config.output)
        return config.output
    write_report = report_writer() if config.report else None
    if config.tensorboard:
        check_tensorboard()
    rows = read_all(config)  # what is wrong with the data is said before the model is loaded
    begin(config)
    base = load_base(config.model, config.dtype, config.threads, ATTENTION, config.fsdp)
    run = Run(config, as_examples(rows, base, config), started)
    method = method_of(config, base)
    run.train(method)
    told = {"command": command, "seconds": round(run.seconds), "skipped": rows.faults.counts}
    adapter = save(config, base.identity, method, run.outcomes, told) if processes().is_main_process else None
    if config.report and write_report:
        samples = take_samples(method, shown_rows(rows, run.examples), config.template[0])
        if adapter:
            write_report(config.report, adapter, run.outcomes, samples)
    processes().wait_for_everyone()
    if adapter:
        run.close()
    return config.output


def shown_rows(rows: Rows, examples: Examples) -> list[Row]:
    """Return the rows that a report may show answers to: held-out ones where there are, without those that were left out."""
    items, some = (examples.held_out, rows.held_out) if rows.held_out else (examples.data, rows.data)
    used = {example.origin for item in items for example in item.examples}
    return [row for row in some if row.origin in used]


def save(
    config: FitConfig, base: BaseIdentity, method: TrainingMethod, outcomes: Mapping[str, Outcome], told: Mapping[str, Any]
) -> Adapter:
    """Write what was trained, with its record and card, and return it as it is read."""
    trained = method.trained()
    record = config_of(config, base, trained, outcomes, told)
    adapter = AdapterStore(config.output.parent).save(Adapter(config.output.name, record, *trained))
    write_record(config.output, adapter.config, render_card(adapter.name, adapter.config))
    return adapter


def report_writer() -> ReportWriter:
    """Return what writes a report. Raises `LoriError` where matplotlib is not installed: before the training, not after."""
    try:
        from training.report import write_report  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise LoriError(f"--report needs: pip install '.[train]' ({error})") from error
    return write_report


def command_of(flags: Sequence[str], environment: Mapping[str, str]) -> str:
    """Return the command line that does again what `flags` do, with the processes that torchrun told the `environment` of."""
    start = ["python"]
    if int(environment.get("WORLD_SIZE", "1")) > 1:
        num_nodes, num_processes = environment.get("GROUP_WORLD_SIZE", "1"), environment.get("LOCAL_WORLD_SIZE", "1")
        nodes = ["--nnodes", num_nodes] if num_nodes != "1" else []
        start = ["torchrun", *nodes, "--nproc-per-node", num_processes]
    return shlex.join([*start, "-m", "training.fit", *(flag for flag in flags if flag != "--resume")])


def main() -> int:
    """Run the program and return its exit code."""
    config = FitConfig.from_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    command = command_of(sys.argv[1:], os.environ)
    go_on = "interrupted: the same command with --resume goes on from the last checkpoint"
    is_there = config.resume and has_ended(config)
    return ended(lambda: f"{'found' if is_there else 'saved'} {fit(config, command)}", go_on)


if __name__ == "__main__":
    sys.exit(main())
