"""`python -m training.fit`: training of a LoRI adapter as published (arXiv 2504.07448, section 3).

Freeze the base; draw A from its seed; train all of B (LoRI-D); take the largest tenth of |B| over all modules as the mask; set B
to zero and train only the masked entries on the same A (LoRI-S).
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
from lori.flags import flag_of
from lori.format import check_replaceable, write_record
from lori.identity import BaseIdentity
from lori.names import EMBEDDED_NAME
from lori.prompt_statistics import Background, find_background
from lori.store.store import AdapterStore
from training.base import load_base
from training.command_line import run_program
from training.config import FitConfig
from training.data import DataError, Faults, Item, Needs, Row, read_rows, tokenize, tokenize_pairs
from training.methods import TrainingMethod, create_method
from training.packing import ATTENTION, check_layers, max_example_length
from training.phase import Outcome
from training.processes import processes
from training.progress import check_tensorboard
from training.prompt_statistics import MIN_ROWS, forms_of, measure_changed, write_statistics
from training.record import config_of, render_card
from training.run import Examples, Run, create_run_folder, is_finished
from training.samples import Sample, take_samples

logger = logging.getLogger(__name__)

ReportWriter = Callable[[Path, Adapter, Mapping[str, Outcome], Sequence[Sample]], None]


@dataclass(frozen=True, slots=True)
class Rows:
    """The usable rows of a run: training data, rows to mix in, held-out rows; and the faults of the bad rows."""

    data: list[Row]
    mix: list[Row]
    held_out: list[Row]
    faults: Faults


def read_all(config: FitConfig) -> Rows:
    """Return the rows of all sources. Raises `DataError` for bad rows, unless `config.on_bad` is "skip"."""
    faults = Faults(config.on_bad)
    needs: Needs = "preference" if config.loss == "dpo" else "text"
    data, held_out = (
        [row for source in sources for row in read_rows(source, needs, faults)] for sources in (config.data, config.held_out)
    )
    mix = [row for source in config.mix for row in read_rows(source, needs="completion", faults=faults)]
    faults.raise_or_warn()
    if config.held_out_fraction:
        random.Random(config.seed).shuffle(data)
        count = max(1, round(config.held_out_fraction * len(data)))
        data, held_out = data[count:], data[:count]
        if not data:
            raise DataError(f"--held-out-fraction {config.held_out_fraction:g} leaves nothing to learn: there are {count} rows")
    return Rows(data, mix, held_out, faults)


def tokenize_rows(rows: Rows, base: BaseModel, config: FitConfig) -> Examples:
    """Return `rows` as tokens. Raises as `read_all`, and `ModelError` for layers that `check_layers` refuses."""
    text_config = base.model.config.get_text_config()
    check_layers(text_config)
    max_length = min(config.max_length, max_example_length(text_config) or config.max_length)

    def items(subset: list[Row], uses_kl: bool = False) -> Sequence[Item]:
        if not subset:
            return []
        if config.loss == "dpo":
            return tokenize_pairs(base.tokenizer, subset, config.template, max_length, rows.faults)
        return tokenize(base.tokenizer, subset, config.template, max_length, uses_kl, rows.faults)

    examples = Examples(items(rows.data), items(rows.mix, uses_kl=True), items(rows.held_out))
    rows.faults.raise_or_warn()
    return examples


def fit(config: FitConfig, command: str) -> Path:
    """Train an adapter, save it, and return its folder. Raises `LoriError`.

    `command` is the command line for the adapter's record and card.
    """
    started = time.monotonic()
    check_replaceable(config.output)
    if config.fsdp and processes().num_processes == 1:
        raise LoriError("--fsdp spreads the base over processes, and there is one: torchrun --nproc-per-node 2 -m training.fit …")
    if config.resume and is_finished(config):
        logger.warning("%s is there, and no run to go on with; without --resume it is trained anew", config.output)
        return config.output
    write_report = report_writer() if config.report else None
    if config.tensorboard:
        check_tensorboard()
    rows = read_all(config)  # before the model is loaded, so that bad rows are reported at once
    create_run_folder(config)
    if processes().is_main_process:
        logger.info("loading the base model: %s", config.model or EMBEDDED_NAME)
    base = load_base(config.model, config.dtype, config.threads, ATTENTION, config.fsdp)
    # Before the training, so that a file that is no background is reported at once.
    background = find_background(base.identity, config.background) if config.prompt_statistics else None
    run = Run(config, tokenize_rows(rows, base, config), started)
    if processes().is_main_process:
        logger.info("examples: %s", run.examples)
    method = create_method(config, base)
    run.train(method)
    run_facts = {"command": command, "seconds": round(run.seconds), "skipped": rows.faults.counts}
    adapter = save(config, base.identity, method, run.outcomes, run_facts) if processes().is_main_process else None
    if config.report and write_report:
        samples = take_samples(method, sample_rows(rows, run.examples), config.template[0])
        if adapter:
            write_report(config.report, adapter, run.outcomes, samples)
    processes().wait_for_everyone()
    if adapter:
        run.close()
        if config.prompt_statistics:
            logger.info("%s", add_statistics(config, method, adapter, used_rows(rows.data, run.examples.data), background))
    return config.output


def add_statistics(
    config: FitConfig, method: TrainingMethod, adapter: Adapter, rows: Sequence[Row], background: Background | None
) -> str:
    """Write statistics of the adapter's prompts beside it, if they can be made. Return a line that says what was done.

    A `KeyboardInterrupt` says how to make them later.
    """
    forms = forms_of(rows, config.seed)
    missing = {
        f"there are {len(rows)} rows, expected at least {MIN_ROWS} of one form, plain prompts or messages": not forms,
        f"the base {method.base.identity.name} has no background (--background)": background is None,
        "the base is spread over processes (--fsdp)": config.fsdp,
    }
    reasons = [reason for reason, is_missing in missing.items() if is_missing]
    if not reasons and background:
        try:
            with method.adapter_disabled():
                statistics = measure_changed(method.base, adapter, background, forms)
            return f"measured the prompts, for automatic weights: {write_statistics(config.output, statistics)}"
        except (LoriError, OSError, RuntimeError, ValueError) as error:  # nothing here may fail a run that has ended well
            reasons = [str(error)]
        except KeyboardInterrupt as error:
            state = f"interrupted: {config.output} is complete, without statistics for automatic weights"
            raise KeyboardInterrupt(f"{state}; to make them: {calibrate_command(config)}") from error
    return f"no statistics for automatic weights: {'; '.join(reasons)}"


def calibrate_command(config: FitConfig) -> str:
    """Return the command that measures the prompts of a trained adapter. It cannot read the pairs of DPO."""
    sources = [source.path if source.model_fields_set == {"path"} else source.model_dump_json() for source in config.data]
    names = ("model", "background", "dtype", "on_bad")
    options = {name: getattr(config, name) for name in names if getattr(config, name) != FitConfig.model_fields[name].default}
    words = ["python", "-m", "training.calibrate", str(config.output)]
    words += [word for source in (["ROWS"] if config.loss == "dpo" else sources) for word in ("--data", source)]
    return shlex.join([*words, *(word for name, value in options.items() for word in (flag_of(name), str(value)))])


def sample_rows(rows: Rows, examples: Examples) -> list[Row]:
    """Return the rows that a report may show answers to: the held-out rows if there are any, without rows that were left out."""
    items, candidates = (examples.held_out, rows.held_out) if rows.held_out else (examples.data, rows.data)
    return used_rows(candidates, items)


def used_rows(rows: Sequence[Row], items: Sequence[Item]) -> list[Row]:
    """Return the rows that `items` were made of."""
    used = {example.origin for item in items for example in item.examples}
    return [row for row in rows if row.origin in used]


def save(
    config: FitConfig, base: BaseIdentity, method: TrainingMethod, outcomes: Mapping[str, Outcome], run_facts: Mapping[str, Any]
) -> Adapter:
    """Write the trained adapter with its record and card. Return the adapter as it reads back from disk."""
    weights = method.trained_weights()
    record = config_of(config, base, weights, outcomes, run_facts)
    adapter = AdapterStore(config.output.parent).save(Adapter(config.output.name, record, *weights))
    write_record(config.output, adapter.config, render_card(adapter.name, adapter.config))
    return adapter


def report_writer() -> ReportWriter:
    """Return `write_report`. Raises `LoriError` if matplotlib is not installed; call it before the training, not after."""
    try:
        from training.report import write_report  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise LoriError(f"--report needs: pip install '.[train]' ({error})") from error
    return write_report


def command_of(flags: Sequence[str], environment: Mapping[str, str]) -> str:
    """Return the command line that repeats a run: its `flags`, and the processes that torchrun set in the `environment`."""
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
    interrupted = "interrupted: the same command with --resume goes on from the last checkpoint, if there is one"
    exists = config.resume and is_finished(config)

    def program() -> str:
        folder = fit(config, command)
        if processes().is_main_process:
            model = ["--model", config.model] if config.model else []
            logger.info("to serve it: %s", shlex.join(["python", "-m", "server", *model, "--adapters", str(folder.parent)]))
        return f"{'found' if exists else 'saved'} {folder}"

    return run_program(program, interrupted)


if __name__ == "__main__":
    sys.exit(main())
