"""The read-only commands on adapters: inspect, verify, compare, duplicates."""

import dataclasses
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import typer

from lori.adapter import Adapter
from lori.cli.arguments import (
    AdapterArgument,
    AdaptersArgument,
    JsonOption,
    ModelOption,
    StoresArgument,
    find_entries,
    find_entry,
    identify_base,
)
from lori.cli.output import folder_bytes, number, percent, print_fields, print_json, print_table, size
from lori.compare.duplicates import near_duplicates
from lori.compare.pairs import Comparison, ModuleComparison, similarity_matrix
from lori.compare.pairs import compare as compare_adapters
from lori.compare.statistics import ModuleStatistics, statistics, total
from lori.errors import AdapterFormatError
from lori.identity import BaseIdentity
from lori.printable import printable
from lori.store.entry import Entry

FORMATS = (".png", ".svg", ".pdf")


def _check_plot_format(path: Path | None) -> Path | None:
    if path and path.suffix.lower() not in FORMATS:
        raise typer.BadParameter(f"{path} ends in {path.suffix!r}, expected one of {', '.join(FORMATS)}")
    return path


PlotOption = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        help="Draw it: a .png, .svg or .pdf file.",
        show_default=False,
        callback=_check_plot_format,
        dir_okay=False,
    ),
]


def inspect(adapter: AdapterArgument, plot: PlotOption = None, json: JsonOption = False) -> None:
    """Show an adapter: what it is, and a row for each module."""
    entry = find_entry(adapter)
    loaded = entry.load()
    modules = statistics(loaded)
    if plot:
        plots = _plots()
        plots.save_figure(plots.plot_statistics(f"{loaded.name}@{loaded.version}", modules), plot)
    num_bytes = folder_bytes(entry.folder)
    if json:
        print_json(
            {"name": loaded.name, "version": loaded.version, "bytes": num_bytes, "bytes_in_memory": loaded.num_bytes}
            | {"config": loaded.config.model_dump(mode="json"), "total": _values(total(modules))}
            | {"modules": [_values(row) for row in modules]}
        )
        return
    print_fields(_fields(loaded, num_bytes))
    columns = ["module", "outputs", "rank", "kept", "density", "empty rows", "largest", "|B|", "|ΔW|"]
    rows = [[row.module, str(row.num_rows), str(row.num_entries // row.num_rows), *_cells(row)] for row in modules]
    print_table(columns, [*rows, ["all", "", "", *_cells(total(modules))]])
    if plot:
        print(f"drew {plot}")


def _fields(adapter: Adapter, num_bytes: int) -> list[tuple[str, str]]:
    config, section = adapter.config, adapter.config.lori
    fields = [
        ("adapter", f"{adapter.name}@{adapter.version}"),
        ("base", config.base_name),
        ("rank, alpha", f"{config.r}, {config.lora_alpha:g}"),
        ("basis", str(section.basis)),
        ("size", f"{size(num_bytes)} on disk, values in {section.values}; {size(adapter.num_bytes)} in memory"),
        ("templates", ", ".join(section.templates)),
        *([("made", origin)] if (origin := _origin(section.training)) else []),
    ]
    fields += [(f"merge with {name}", f"weights {a:g} and {b:g}") for name, (a, b) in section.merge_weights.items()]
    return fields + [(name, f"{value:.3f}") for name, value in section.metrics.items()]


def _origin(record: dict[str, Any]) -> str:
    match record:
        case {"merge": {"method": method, "adapters": list(parents)}}:
            return f"merged by {method}: " + ", ".join(f"{p['weight']:g} {p['name']}@{p['version']}" for p in parents)
        case {"imported": {"from": source}}:
            return f"imported from a PEFT adapter on {source}"
        case {"command": str(command)}:
            return command
    return ""


def _cells(row: ModuleStatistics) -> list[str]:
    counts = [str(row.num_kept), percent(row.density), percent(row.empty_rows)]
    return counts + [f"{value:.3g}" for value in (row.max_abs, row.norm_b, row.norm_delta)]


def _values(row: ModuleStatistics) -> dict[str, Any]:
    return dataclasses.asdict(row) | {"density": row.density, "empty_rows": row.empty_rows}


def verify(adapters: StoresArgument, model: ModelOption = None, json: JsonOption = False) -> None:
    """Verify adapters, or all of a store: digests, masks, values, A drawn again; with --model, that they are for that base."""
    base = identify_base(model) if model else None
    rows: list[dict[str, Any]] = []
    for entry in [entry for path in adapters for entry in find_entries(path)]:
        faults = _faults(entry, base)
        rows.append({"adapter": entry.folder.name, "folder": str(entry.folder), "faults": faults})
    if json:
        print_json(rows)
    else:
        for row in rows:
            print(f"{printable(row['adapter'])}: {'not sound' if row['faults'] else 'sound'}")
            print(*(f"  {printable(fault)}\n" for fault in row["faults"]), sep="", end="")
    if any(row["faults"] for row in rows):
        raise typer.Exit(1)


def _faults(entry: Entry, base: BaseIdentity | None) -> list[str]:
    faults: list[str] = []
    digest = None
    try:
        digest = entry.load(base).config.lori.content_digest
    except AdapterFormatError as error:
        faults += error.faults_with_path
    try:
        entry.prompt_statistics(digest)
    except AdapterFormatError as error:
        faults += error.faults_with_path
    return faults


def compare(
    adapters: AdaptersArgument,
    weight: Annotated[
        list[float] | None,
        typer.Option(
            "--weight", "-w", help="One for each adapter, in order, in the sum's norm; 1 if absent.", show_default=False
        ),
    ] = None,
    plot: PlotOption = None,
    json: JsonOption = False,
) -> None:
    """Compare adapters before merging them: two module by module, more in pairs. Cosines and norms are of their deltas."""
    if len(adapters) < 2:
        raise typer.BadParameter("expected two adapters or more", param_hint="ADAPTERS")
    weights = weight or [1.0] * len(adapters)
    if len(weights) != len(adapters):
        raise typer.BadParameter(f"{len(weights)} of them, expected {len(adapters)}, one for each adapter", param_hint="--weight")
    loaded = [find_entry(path).load() for path in adapters]
    names = [adapter.name for adapter in loaded]
    labels = names if len(set(names)) == len(names) else [f"{adapter.name}@{adapter.version[:6]}" for adapter in loaded]
    pairs = [
        (labels[i], labels[j], compare_adapters(loaded[i], loaded[j], (weights[i], weights[j])))
        for i, j in combinations(range(len(loaded)), 2)
    ]
    if plot:
        plots = _plots()
        plots.save_figure(plots.plot_matrix(labels, similarity_matrix(loaded)), plot)
    if json:
        print_json([_comparison_values(*pair) for pair in pairs])
        return
    columns = ["overlap", "by chance", "sign conflict", "cosine", "|ΔW a|", "|ΔW b|", "|sum|"]
    if len(pairs) == 1:
        a, b, comparison = pairs[0]
        rows = [[row.module, *_comparison_cells(row)] for row in comparison.modules]
        print_table(["module", *columns], [*rows, ["all", *_comparison_cells(comparison.total)]], f"a: {a}, b: {b}")
    else:
        print_table(["a", "b", *columns], [[a, b, *_comparison_cells(comparison.total)] for a, b, comparison in pairs])
    if plot:
        print(f"drew {plot}")


def _comparison_cells(row: ModuleComparison) -> list[str]:
    shares = [percent(share) for share in (row.overlap, row.chance_overlap, row.sign_conflict)]
    return [*shares, *(number(value) for value in (row.cosine, row.norm_a, row.norm_b, row.norm_sum))]


def _comparison_values(a: str, b: str, comparison: Comparison) -> dict[str, Any]:
    fields = ("overlap", "chance_overlap", "sign_conflict", "cosine", "norm_a", "norm_b", "norm_sum")

    def values(row: ModuleComparison) -> dict[str, Any]:
        return {"module": row.module} | {field: getattr(row, field) for field in fields}

    return {"a": a, "b": b, "total": values(comparison.total), "modules": [values(row) for row in comparison.modules]}


def duplicates(
    stores: StoresArgument,
    threshold: Annotated[float, typer.Option(help="The least cosine of two deltas.", min=0.5, max=1.0)] = 0.95,
    json: JsonOption = False,
) -> None:
    """Find near duplicates among adapters, or in stores."""
    entries = [entry for path in stores for entry in find_entries(path)]
    pairs = near_duplicates({str(entry.folder): entry.load for entry in entries}, threshold)
    if json:
        print_json([dataclasses.asdict(pair) for pair in pairs])
    elif pairs:
        print_table(["a", "b", "cosine"], [[_short(pair.a), _short(pair.b), f"{pair.cosine:.4f}"] for pair in pairs])
    else:
        print(f"of {len(entries)} adapters, no two have a cosine of {threshold:g} or more")


def _short(folder: str) -> str:
    return "/".join(Path(folder).parts[-2:])


def _plots() -> Any:
    try:
        from lori.compare import plots  # noqa: PLC0415  # matplotlib is an extra
    except ImportError as error:
        raise typer.BadParameter(f"needs matplotlib: pip install '.[plot]' ({error})", param_hint="--plot") from error
    return plots


COMMANDS = (inspect, verify, compare, duplicates)
