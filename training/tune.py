"""`python -m training.tune`: the weights of a merge, fitted to a few rows by their gradient, saved as a named merge.

A request may use the merge's name like an adapter's, on a server that was started with `--merges FOLDER`.
"""

import csv
import io
import logging
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import Field, model_validator
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lori.adapter import Adapter
from lori.base_model import BaseModel
from lori.errors import AdapterError, LoriError
from lori.merge import blocks_of_layers
from lori.merge_options import MAX_ADAPTERS, MAX_WEIGHT
from lori.named_merge import (
    MAX_BLOCKS,
    MAX_SOURCE_CHARACTERS,
    MAX_SOURCES,
    SUFFIX,
    MergedAdapter,
    NamedMerge,
    repeated,
    weights_text,
)
from lori.names import AUTO, NAME, RESERVED, check_name, is_name
from lori.store.files import check_writable, replace_file
from lori.store.store import AdapterStore
from lori.template import common_templates
from training.base import RowsConfig, load_base
from training.command_line import run_program
from training.data import DataError, Example, Faults, Row, Source, read_rows, tokenize
from training.evaluation.local_adapters import find_adapter
from training.evaluation.local_answerer import row_template
from training.merge_score import MergeScorer
from training.packing import max_example_length
from training.weight_descent import DescentOptions, WeightDescent
from training.weight_trials import Trial, Weights, best_of, equal_weights, repeat_in_blocks, split_blocks, unit_weights

logger = logging.getLogger(__name__)

Plot = Callable[[str, Sequence[str], int, Sequence[Trial], Path], None]
NUM_SCORED = 8
"""How many times the weights are scored during the descent."""
MAX_NAMED = 3
"""Maximum number of sources that the plot's title names."""
MIN_ROWS = 8
"""Minimum number of rows of a source that are held out, and of those that are not."""


class TuneConfig(RowsConfig):
    """Fit the weights of a merge to a few rows, by gradient descent, and save them as a named merge."""

    adapter: list[str] = Field(min_length=1, max_length=MAX_ADAPTERS)
    """The adapters: folders, or with --adapters names."""
    adapters: Path | None = None
    """The folder of the adapters that --adapter names."""
    data: list[Source] = Field(min_length=1, max_length=MAX_SOURCES)
    """Rows with completions, one source for each thing that the merge has to do. All sources count the same."""
    output: Path
    """The file to write, NAME.json; beside it come NAME.png, a plot of the scores and the best weights, and NAME.csv, the
    trials."""
    num_rows: int = Field(default=128, ge=32)
    """Maximum number of rows of each source, drawn at random."""
    max_length: int = Field(default=1024, ge=2)
    """Maximum tokens of a row. Longer rows are bad rows; none is cut."""
    held_out_fraction: float = Field(default=0.25, gt=0, lt=1)
    """Fraction of each source's rows that is held out. The weights are scored on these rows and fitted to the others."""
    steps: int = Field(default=80, ge=NUM_SCORED)
    """Optimizer steps."""
    batch_size: int = Field(default=8, ge=1)
    """Rows of a step. Each source has an equal part of them, and one at least."""
    num_blocks: int = Field(default=1, ge=1, le=MAX_BLOCKS)
    """Blocks of layers, from the first to the last, in which each adapter has a weight of its own; at most as many as the layers
    that each adapter changes."""
    max_weight: float = Field(default=4, ge=1, le=MAX_WEIGHT, multiple_of=0.01)
    """The largest weight of an adapter. The smallest is its negative."""

    @model_validator(mode="after")
    def _check_flags(self) -> "TuneConfig":
        faults, paths = list[str](), [source.path for source in self.data]
        if self.output.stem == AUTO:
            faults.append(f"--output is {str(self.output)!r}, and {AUTO!r} {RESERVED}")
        elif self.output.suffix != SUFFIX or not is_name(self.output.stem):
            faults.append(f"--output is {str(self.output)!r}, expected NAME{SUFFIX} with a NAME that matches {NAME.pattern}")
        if len({*paths}) < len(paths):
            faults.append("--data has one path twice, expected each once")
        if (longest := max(map(len, paths))) > MAX_SOURCE_CHARACTERS:
            faults.append(f"--data has a path of {longest} characters, expected {MAX_SOURCE_CHARACTERS} at most")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def files(self) -> tuple[Path, Path, Path]:
        """The files to write: the merge, the plot, and the table."""
        return self.output, self.output.with_suffix(".png"), self.output.with_suffix(".csv")


def tune(config: TuneConfig) -> str:
    """Fit the weights, write the named merge with its plot and table, and return a report. Raises `LoriError` and `OSError`."""
    plot = trial_plotter()
    if existing := [str(file) for file in config.files if os.path.lexists(file)]:
        raise LoriError(f"--output: remove {', '.join(existing)} first, or give another name")
    config.output.parent.mkdir(parents=True, exist_ok=True)
    check_writable(config.output)  # before the descent, not after
    faults = Faults(config.on_bad)
    rows = _distinct({source.path: read_rows(source, faults=faults) for source in config.data})
    faults.raise_or_warn()
    drawn = {source: config.draw(source_rows, config.num_rows) for source, source_rows in rows.items()}
    base = load_base(config.model, config.dtype, config.threads)
    adapters = [find_adapter(reference, config.adapters, base.identity) for reference in config.adapter]
    names = [_own_name(config.adapters, *pair) for pair in zip(config.adapter, adapters, strict=True)]
    references = [f"{name}@{adapter.version}" for name, adapter in zip(names, adapters, strict=True)]
    if duplicates := repeated(references):
        raise AdapterError(f"--adapter names {', '.join(duplicates)} twice, expected each adapter once")
    if config.num_blocks > 1:
        _check_blocks(config.num_blocks, adapters)
    examples, held_out = _split(drawn, _tokenize(config, base, adapters, drawn, faults), config.held_out_fraction)
    scorer = MergeScorer(base, adapters, held_out, config.num_blocks)
    trials = _descend(config, scorer, examples)
    best = best_of(trials)
    num_scored = sum(map(len, held_out.values()))
    merge = NamedMerge(
        base_digest=base.identity.digest,
        adapters=[*map(_merged_adapter, references, split_blocks(best.weights, config.num_blocks))],
        about=f"python -m training.tune, {config.steps} steps, scored on {num_scored} rows",
        scores={source: round(share, 4) for source, share in scorer.shares(best.weights).items()},
    )
    output, plot_file, table_file = config.files
    columns = names if config.num_blocks == 1 else [f"{name} {i}" for name in names for i in range(1, config.num_blocks + 1)]
    replace_file(table_file, _table(columns, scorer, trials).encode())
    sources = ", ".join(Path(source).name for source in held_out) if len(held_out) <= MAX_NAMED else f"{len(held_out)} sources"
    title = f"{output.stem}: scored on {num_scored} held-out rows of {sources}"
    plot(title, names, config.num_blocks, trials, plot_file)
    replace_file(output, merge.to_bytes())
    return "\n".join([*_report(merge, scorer, trials), f"wrote {output}; {_serving(config)}"])


def _check_blocks(num_blocks: int, adapters: Sequence[Adapter]) -> None:
    for adapter in adapters:
        if num_blocks > (num_layers := len(blocks_of_layers(tuple(adapter.modules), num_blocks))):
            raise AdapterError(
                f"--num-blocks is {num_blocks}, expected {num_layers} at most: {adapter.name!r} changes {num_layers} layers"
            )


def _distinct(rows: Mapping[str, Sequence[Row]]) -> dict[str, list[Row]]:
    """Return the rows of each source without duplicates, in it or in earlier ones, so that no row is both fitted and held out."""
    seen = set[object]()
    distinct: dict[str, list[Row]] = {source: [] for source in rows}
    for source, source_rows in rows.items():
        for row in source_rows:
            if (key := (row.content, row.template)) not in seen:
                seen.add(key)
                distinct[source].append(row)
        if num_left_out := len(source_rows) - len(distinct[source]):
            logger.info("%s: rows left out that came before: %d", source, num_left_out)
    return distinct


def _tokenize(
    config: TuneConfig, base: BaseModel, adapters: Sequence[Adapter], rows: Mapping[str, Sequence[Row]], faults: Faults
) -> dict[str, list[Example]]:
    """Return the rows of each source as tokens, each under one template, with the end of text.

    Raises `DataError` for rows that cannot be used, such as too long ones, unless `config` says that they are left out.
    """
    templates = common_templates([(adapter.name, adapter.config.lori.templates) for adapter in adapters])
    text_config = base.model.config.get_text_config()
    limits = (config.max_length, max_example_length(text_config), getattr(text_config, "max_position_embeddings", None))
    max_length = min(limit for limit in limits if limit)
    examples = {}
    for source, source_rows in rows.items():
        with_template = [row.model_copy(update={"template": row_template(row, templates)}) for row in source_rows]
        examples[source] = tokenize(base.tokenizer, with_template, templates, max_length, faults=faults)
    faults.raise_or_warn()
    return examples


def _split(
    rows: Mapping[str, Sequence[Row]], examples: Mapping[str, Sequence[Example]], held_out_fraction: float
) -> tuple[dict[str, Sequence[Example]], dict[str, Sequence[Row]]]:
    """Return the examples of each source that the weights are fitted to, and the rows of the others, which are held out.

    Raises `DataError` if a part would have fewer than `MIN_ROWS`.
    """
    fitted, held_out = dict[str, Sequence[Example]](), dict[str, Sequence[Row]]()
    for source, source_examples in examples.items():
        count = round(held_out_fraction * len(source_examples))
        if min(count, len(source_examples) - count) < MIN_ROWS:
            fault = f"--held-out-fraction {held_out_fraction:g} of {len(source_examples)} distinct rows is {count}"
            raise DataError(f"{source}: {fault}, expected {MIN_ROWS} at least that are held out, and as many that are not")
        origins = {example.origin for example in source_examples[:count]}
        fitted[source] = source_examples[count:]
        held_out[source] = [row for row in rows[source] if row.origin in origins]
    return fitted, held_out


def _descend(config: TuneConfig, scorer: MergeScorer, examples: Mapping[str, Sequence[Example]]) -> list[Trial]:
    """Return the trials: weights that people try first, then those of the descent, which starts from the best equal ones."""
    num_blocks, num_adapters = config.num_blocks, len(scorer.adapters)
    alone = [repeat_in_blocks(weights, num_blocks) for weights in unit_weights(num_adapters)]
    equal = [repeat_in_blocks(weights, num_blocks) for weights in equal_weights(num_adapters)]
    options = DescentOptions(config.steps, config.batch_size, config.max_weight, config.seed)
    with logging_redirect_tqdm(), tqdm(total=config.steps, unit="step", desc="weights", disable=None) as bar:
        trials = [Trial(weights, scorer.score(weights)) for weights in dict.fromkeys([*alone, *equal])]
        start = max(equal, key=scorer.score)
        logger.info("before the first step: score %.3f", scorer.score(start))
        descent = WeightDescent(scorer.base, scorer.adapters, examples, scorer.gains(), num_blocks)
        scored_at = {config.steps * (i + 1) // NUM_SCORED for i in range(NUM_SCORED)}
        for step, weights in enumerate(descent.descend(start, options), 1):
            if step in scored_at:
                trials.append(Trial(weights, scorer.score(weights), step))
                logger.info("step %d of %d: score %.3f", step, config.steps, trials[-1].score)
            bar.update()
    return trials


def _merged_adapter(reference: str, weights: Weights) -> MergedAdapter:
    if len({*weights}) == 1:
        return MergedAdapter(reference=reference, weight=weights[0])
    return MergedAdapter(reference=reference, weight=1.0, block_weights=[*weights])


def trial_plotter() -> Plot:
    """Return `plot_trials`. Raises `LoriError` if matplotlib is not installed; call it before the descent, not after."""
    try:
        from training.trial_plot import plot_trials  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise LoriError(f"training.tune needs: pip install '.[train]' ({error})") from error
    return plot_trials


def _own_name(store: Path | None, reference: str, adapter: Adapter) -> str:
    """Return the adapter's own name, since an alias may come to mean another adapter. Raises `AdapterError` if it has none."""
    name = AdapterStore(store).find(reference).folder.name.partition("@")[0] if store else adapter.name
    check_name(name)
    return name


def _serving(config: TuneConfig) -> str:
    """Return the end of the report: the command that serves the merge."""
    model = ["--model", config.model] if config.model else []
    stores = {str(config.adapters)} if config.adapters else {str(Path(folder).parent) for folder in config.adapter}
    [store] = stores if len(stores) == 1 else ["FOLDER"]
    command = ["python", "-m", "server", *model, "--adapters", store, "--merges", str(config.output.parent)]
    note = "" if len(stores) == 1 else ", once the adapters are in one FOLDER"
    return f"to serve it as {config.output.stem!r}{note}: {shlex.join(command)}"


def _report(merge: NamedMerge, scorer: MergeScorer, trials: Sequence[Trial]) -> list[str]:
    equal = repeat_in_blocks(equal_weights(len(scorer.adapters))[0], scorer.num_blocks)
    equal_shares = scorer.shares(equal)
    lines = [f"best of {len(trials)} trials: {' + '.join(map(_weights_text, merge.adapters))}"]
    lines += [
        f"{source}: {share:.2f} of the best single adapter's gain, {equal_shares[source]:.2f} at {equal[0]:g} each"
        for source, share in scorer.shares(best_of(trials).weights).items()
    ]
    return lines


def _weights_text(adapter: MergedAdapter) -> str:
    return f"{weights_text(adapter.weights)} {adapter.reference}"


def _table(names: Sequence[str], scorer: MergeScorer, trials: Sequence[Trial]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["step", *(f"weight of {name}" for name in names), "score", *(f"share of {source}" for source in scorer.rows)])
    for trial in trials:
        table.writerow(
            [trial.step, *trial.weights, round(trial.score, 4), *(round(s, 4) for s in scorer.shares(trial.weights).values())]
        )
    return text.getvalue()


def main() -> int:
    """Run the program and return its exit code."""
    config = TuneConfig.from_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run_program(lambda: tune(config))


if __name__ == "__main__":
    sys.exit(main())
