"""`python -m training.tune`: the weights of a merge, searched on a few rows, saved as a named merge.

A request may use the merge's name like an adapter's, on a server that was started with `--merges FOLDER`.
"""

import csv
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import NamedTemporaryFile

from pydantic import Field, model_validator
from tqdm import tqdm

from lori.adapter import Adapter
from lori.errors import AdapterError, LoriError
from lori.merge_options import MAX_ADAPTERS, MAX_WEIGHT
from lori.named_merge import SUFFIX, MergedAdapter, NamedMerge, repeated_references
from lori.names import NAME, check_name, is_name, weight_text
from lori.store.files import replace_file
from lori.store.store import AdapterStore
from training.base import load_base
from training.command_line import run_program
from training.data import Faults, Source, read_rows
from training.evaluation.local_adapters import find_adapter
from training.merge_score import MergeScorer
from training.prompt_features import PromptsConfig
from training.weight_search import (
    Trial,
    Weights,
    best_of,
    even_weights,
    repeat_in_blocks,
    search,
    split_blocks,
    starting_points,
)

Plot = Callable[[Sequence[str], Sequence[Trial], Path], None]


class TuneConfig(PromptsConfig):
    """Search the weights of a merge on a few rows, without gradients, and save them as a named merge."""

    adapter: list[str] = Field(min_length=1, max_length=MAX_ADAPTERS)
    """The adapters: folders, or with --adapters names."""
    adapters: Path | None = None
    """The folder of the adapters that --adapter names."""
    data: list[Source] = Field(min_length=1)
    """Rows with completions, one source for each thing that the merge has to do. All sources count the same."""
    output: Path
    """The file to write, NAME.json; beside it come NAME.png, a plot of the trials, and NAME.csv, their figures."""
    num_rows: int = Field(default=64, ge=8)
    """Maximum number of rows of each source, drawn at random."""
    num_trials: int = Field(default=40, ge=1)
    """Maximum number of weights that are tried, the first ones too. The search may end earlier, once its steps are below 0.02."""
    num_blocks: int = Field(default=1, ge=1, le=16)
    """Blocks of layers, from the first to the last, in which each adapter has a weight of its own. The first third of the trials
    has equal weights in all blocks. More blocks need more trials."""
    max_weight: float = Field(default=1.5, ge=1, le=MAX_WEIGHT, multiple_of=0.01)
    """The largest weight of an adapter; the smallest is 0."""

    @model_validator(mode="after")
    def _check_flags(self) -> "TuneConfig":
        faults, paths = list[str](), [source.path for source in self.data]
        if self.output.suffix != SUFFIX or not is_name(self.output.stem):
            faults.append(f"--output is {str(self.output)!r}, expected NAME{SUFFIX} with a NAME that matches {NAME.pattern}")
        if len({*paths}) < len(paths):
            faults.append("--data has one path twice, expected each once")
        if self.num_trials < (min_trials := len(starting_points(len(self.adapter)))):
            faults.append(f"--num-trials is {self.num_trials}, expected {min_trials} at least: so many weights are tried first")
        # COBYQA first tries two points for each weight.
        min_trials = self.num_equal_trials + 2 * len(self.adapter) * self.num_blocks + 1
        if self.num_blocks > 1 and self.num_trials < min_trials:
            faults.append(
                f"--num-trials is {self.num_trials}, expected {min_trials} at least for {self.num_blocks} blocks of layers"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def num_equal_trials(self) -> int:
        """Maximum number of trials of weights that are equal in all blocks."""
        return self.num_trials if self.num_blocks == 1 else max(len(starting_points(len(self.adapter))), self.num_trials // 3)

    @property
    def files(self) -> tuple[Path, Path, Path]:
        """The files to write: the merge, the plot, and the table."""
        return self.output, self.output.with_suffix(".png"), self.output.with_suffix(".csv")


def tune(config: TuneConfig) -> str:
    """Search, and write the named merge with its plot and table. Return what is best. Raises `LoriError` and `OSError`."""
    plot = trial_plotter()
    if existing := [str(file) for file in config.files if os.path.lexists(file)]:
        raise LoriError(f"--output: {', '.join(existing)} is there already: remove it, or give another name")
    config.output.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=config.output.parent):  # raises before the search, not after, if the folder cannot be written
        pass
    faults = Faults(config.on_bad)
    rows = {source.path: config.draw(read_rows(source, faults=faults), config.num_rows) for source in config.data}
    faults.raise_or_warn()
    base = load_base(config.model, config.dtype, config.threads)
    adapters = [find_adapter(reference, config.adapters, base.identity) for reference in config.adapter]
    names = [_own_name(config.adapters, *pair) for pair in zip(config.adapter, adapters, strict=True)]
    references = [f"{name}@{adapter.version}" for name, adapter in zip(names, adapters, strict=True)]
    if repeated := repeated_references(references):
        raise AdapterError(f"--adapter names {', '.join(repeated)} twice, expected each adapter once")
    if config.num_blocks > 1 and len({adapter.basis for adapter in adapters}) > 1:
        bases = "; ".join(f"{adapter.name}: {adapter.basis}" for adapter in adapters)
        raise AdapterError(f"--num-blocks needs adapters on one basis, found {bases}")
    scorer = MergeScorer(base, adapters, rows, config.num_blocks)
    trials = _search(config, scorer)
    best = best_of(trials)
    merge = NamedMerge(
        base_digest=base.identity.digest,
        adapters=[*map(_merged_adapter, references, split_blocks(best.weights, config.num_blocks))],
        about=f"python -m training.tune, {len(trials)} trials on {sum(map(len, rows.values()))} rows",
        scores={source: round(share, 4) for source, share in scorer.shares(best.weights).items()},
    )
    output, plot_file, table_file = config.files
    columns = names if config.num_blocks == 1 else [f"{name} {i}" for name in names for i in range(1, config.num_blocks + 1)]
    replace_file(table_file, _table(columns, scorer, trials).encode())
    plot(columns, trials, plot_file)
    replace_file(output, merge.to_bytes())
    return "\n".join(_report(merge, scorer, trials, output))


def _search(config: TuneConfig, scorer: MergeScorer) -> list[Trial]:
    """Return what was tried: first weights that are equal in all blocks, then from the best of these on any weights."""
    starts, num_blocks = starting_points(len(scorer.adapters)), config.num_blocks
    with tqdm(total=config.num_trials, unit="trial", desc="weights", disable=None) as bar:

        def score_equal(weights: Weights) -> float:
            return scorer.score(repeat_in_blocks(weights, num_blocks))

        equal = search(score_equal, starts, config.max_weight, config.num_equal_trials, bar.update)
        trials = [Trial(repeat_in_blocks(trial.weights, num_blocks), trial.score) for trial in equal]
        if num_blocks > 1:
            trials += search(scorer.score, [], config.max_weight, config.num_trials - len(trials), bar.update, known=trials)
    return trials


def _merged_adapter(reference: str, weights: Weights) -> MergedAdapter:
    if len({*weights}) == 1:
        return MergedAdapter(reference=reference, weight=weights[0])
    return MergedAdapter(reference=reference, weight=1.0, block_weights=[*weights])


def trial_plotter() -> Plot:
    """Return `plot_trials`. Raises `LoriError` if scipy or matplotlib is not installed; call it before the search, not after."""
    try:
        from training.trial_plot import plot_trials  # noqa: PLC0415  # an extra
    except ImportError as error:
        raise LoriError(f"training.tune needs: pip install '.[train]' ({error})") from error
    if find_spec("scipy") is None:
        raise LoriError("training.tune needs: pip install '.[train]' (No module named 'scipy')")
    return plot_trials


def _own_name(store: Path | None, reference: str, adapter: Adapter) -> str:
    """Return the adapter's own name, since an alias may come to mean another adapter. Raises `AdapterError` if it has none."""
    name = AdapterStore(store).find(reference).folder.name.partition("@")[0] if store else adapter.name
    check_name(name)
    return name


def _report(merge: NamedMerge, scorer: MergeScorer, trials: Sequence[Trial], output: Path) -> list[str]:
    even = repeat_in_blocks(even_weights(len(scorer.adapters)), scorer.num_blocks)
    even_shares = scorer.shares(even)
    lines = [f"best of {len(trials)} trials: {' + '.join(map(_shown, merge.adapters))}"]
    lines += [
        f"{source}: {share:.2f} of the best single adapter's gain, {even_shares[source]:.2f} at {even[0]:g} each"
        for source, share in scorer.shares(best_of(trials).weights).items()
    ]
    return [*lines, f"wrote {output}: to serve it, python -m server --merges {output.parent}; its name is {output.stem!r}"]


def _shown(adapter: MergedAdapter) -> str:
    weights = adapter.block_weights or [adapter.weight]
    return f"{adapter.reference}:{','.join(map(weight_text, weights))}"


def _table(names: Sequence[str], scorer: MergeScorer, trials: Sequence[Trial]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*(f"weight of {name}" for name in names), "score", *(f"share of {source}" for source in scorer.rows)])
    for trial in trials:
        table.writerow([*trial.weights, round(trial.score, 4), *(round(s, 4) for s in scorer.shares(trial.weights).values())])
    return text.getvalue()


def main() -> int:
    """Run the program and return its exit code."""
    config = TuneConfig.from_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run_program(lambda: tune(config))


if __name__ == "__main__":
    sys.exit(main())
