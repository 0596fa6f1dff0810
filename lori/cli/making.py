"""The command that makes an adapter of others: merge."""

from pathlib import Path
from typing import Annotated

import typer

from lori.cli.output import say_rounding
from lori.cli.places import AdaptersArgument, find_entry
from lori.cli.storing import say_published
from lori.format import stored_as
from lori.merge import DEFAULTS, MergeMethod, SignMethod
from lori.merge import merge as merge_adapters
from lori.names import check_name
from lori.store import AdapterStore
from lori.values import ValueType


def merge(
    adapters: AdaptersArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="store/name of the new adapter.", show_default=False)],
    weight: Annotated[
        list[float] | None,
        typer.Option("--weight", "-w", help="One for each adapter, in order; 1/n if absent.", show_default=False),
    ] = None,
    method: Annotated[MergeMethod, typer.Option(help="How: `linear` is the exact weighted sum.")] = DEFAULTS.method,
    density: Annotated[
        float, typer.Option(help="Share of each one's kept entries that survive; not for linear.")
    ] = DEFAULTS.density,
    sign: Annotated[SignMethod, typer.Option(help="How ties and dare_ties elect a sign.")] = DEFAULTS.sign,
    seed: Annotated[int, typer.Option(help="Draws what DARE drops.", min=0)] = DEFAULTS.seed,
    values: Annotated[ValueType, typer.Option(help="How B's values are stored.")] = "bfloat16",
) -> None:
    """Merge adapters into a new one. A server merges `linear` in every request, at no cost: this keeps or ships a mixture."""
    check_name(output.name)
    loaded = [find_entry(path).load() for path in adapters]
    weights = weight or [1 / len(loaded)] * len(loaded)
    if len(weights) != len(loaded):
        raise typer.BadParameter(f"{len(weights)} of them, expected {len(loaded)}, one for each adapter", param_hint="--weight")
    merged = merge_adapters(loaded, weights, method, name=output.name, density=density, sign=sign, seed=seed)
    say_rounding(merged, values)
    entry = AdapterStore(output.parent).add(stored_as(merged, values))
    say_published(entry, merged)


COMMANDS = (merge,)
