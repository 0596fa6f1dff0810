"""A page about a run: loss curves, what a mask keeps where, answers before and after. One file, which loads nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lori.adapter import Adapter
from lori.compare.plots import plot_statistics
from lori.compare.statistics import statistics, total
from lori.names import NUM_VERSION_DIGITS
from lori.store.files import replace_file
from training.card import method_of
from training.outcome import Outcome
from training.plots import as_svg, plot_losses
from training.samples import Sample


def write_report(path: Path, adapter: Adapter, outcomes: Mapping[str, Outcome], samples: Sequence[Sample]) -> None:
    """Writes the page of a run that made `adapter`."""
    modules = statistics(adapter)
    record = adapter.config.lori.training
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    text = environment.get_template("report.html").render(
        name=adapter.name,
        about=record["about"],
        method=method_of(record),
        base=adapter.config.base_model_name_or_path,
        rank=adapter.config.r,
        num_kept=total(modules).num_kept,
        num_entries=total(modules).num_entries,
        version=adapter.config.lori.content_digest[:NUM_VERSION_DIGITS],
        command=record["command"],
        losses=Markup(as_svg(plot_losses(outcomes))),
        phases=[_phase(name, outcome) for name, outcome in outcomes.items()],
        has_held_out=any(outcome.held_out for outcome in outcomes.values()),
        mix_fraction=record["mix_fraction"] if record["mix"] else 0,
        skipped=record["skipped"],
        statistics=Markup(as_svg(plot_statistics(adapter.name, modules))),
        samples=samples,
        samples_from="held-out rows" if record["held_out"] or record["held_out_fraction"] else "rows that were learnt",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode())


def _phase(name: str, outcome: Outcome) -> dict[str, object]:
    best = next((found for found in outcome.held_out if found[0] == outcome.best_step), None)
    steps, loss = len(outcome.losses), outcome.recent_loss
    return {"name": name, "steps": steps, "tokens": outcome.num_tokens, "loss": loss, "best": best}
