"""The command that combines adapters into a new one: merge."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lori.adapter import Adapter
from lori.cli.arguments import AdaptersArgument, JsonOption, check_output, find_entry
from lori.cli.output import print_made
from lori.errors import AdapterError
from lori.merge import merge as merge_adapters
from lori.merge_options import DEFAULTS, MergeMethod, MergeOptions, SignMethod
from lori.sparse import ValueType, rounding_error
from lori.store.store import AdapterStore
from lori.template import Template

EXACT: ValueType = "float32"


def merge(
    adapters: AdaptersArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="store/name of the new adapter.", show_default=False)],
    weight: Annotated[
        list[float] | None,
        typer.Option("--weight", "-w", help="One for each adapter, in order; 1/n if absent.", show_default=False),
    ] = None,
    method: Annotated[MergeMethod, typer.Option(help="How: `linear` is the exact weighted sum.")] = DEFAULTS.method,
    density: Annotated[
        float | None,
        typer.Option(
            help=f"Share of each one's kept entries to survive; {DEFAULTS.density:g} if absent.",
            show_default=False,
            min=0,
            max=1,
        ),
    ] = None,
    sign: Annotated[
        SignMethod | None,
        typer.Option(help=f"How TIES elects a sign; {DEFAULTS.sign} if absent.", show_default=False),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Draws what DARE drops; 0 if absent.", min=0, show_default=False)] = None,
    template: Annotated[
        Template | None,
        typer.Option(help="How its prompts are written; what all the adapters were trained on if absent.", show_default=False),
    ] = None,
    values: Annotated[ValueType, typer.Option(help="How B's values are stored.")] = "bfloat16",
    json: JsonOption = False,
) -> None:
    """Merge adapters into a new one. A server merges `linear` in every request, at no cost: this keeps or ships a mixture."""
    check_output(output)
    optional = (("density", density), ("sign", sign), ("seed", seed))
    arguments: dict[str, Any] = {option: value for option, value in optional if value is not None}
    if unused := arguments.keys() - MergeOptions(method).used.keys():
        raise typer.BadParameter(f"{method} has no {' and no '.join(sorted(unused))}")
    try:
        options = MergeOptions(method, **arguments)
    except AdapterError as error:
        raise typer.BadParameter(str(error)) from error
    loaded = [find_entry(path).load() for path in adapters]
    weights = weight or [1 / len(loaded)] * len(loaded)
    if len(weights) != len(loaded):
        raise typer.BadParameter(f"{len(weights)} of them, expected {len(loaded)}, one for each adapter", param_hint="--weight")

    def merge_as(value_type: ValueType) -> Adapter:
        return merge_adapters(
            loaded,
            weights,
            method,
            name=output.name,
            values=value_type,
            density=options.density,
            sign=options.sign,
            seed=options.seed,
            templates=None if template is None else (template,),
        )

    merged = merge_as(values)
    exact = merged if values == EXACT else merge_as(EXACT)
    entry = AdapterStore(output.parent).add(merged)
    print_made(entry, merged, {"rounding_error": rounding_error(exact.modules.values(), values)}, json)


COMMANDS = (merge,)
