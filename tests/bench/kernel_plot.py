"""Plot of the kernel benchmark: time of the deltas and of the base product by number of tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLOURS = {"identical": "tab:green", "zipf": "tab:orange", "uniform": "tab:purple", "distinct": "tab:blue"}


def plot(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write a plot with a panel for each shape: one term, the fewest threads, and cold caches if they were measured."""
    threads = min(row["threads"] for row in rows)
    cache = "cold" if any(row["cache"] == "cold" for row in rows) else "hot"
    chosen = [row for row in rows if (row["threads"], row["cache"], row["terms"]) == (threads, cache, 1)]
    shapes = list(dict.fromkeys((row["model"], row["shape"]) for row in chosen))
    columns = min(4, len(shapes))
    lines = -(-len(shapes) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * lines + 0.8), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    for panel, (model, shape) in zip(axes.flat, shapes, strict=False):
        _panel(panel, [row for row in chosen if (row["model"], row["shape"]) == (model, shape)])
        panel.set_title(f"{model}, {shape}", fontsize=10)
    for panel in axes.flat[len(shapes) :]:
        panel.set_visible(False)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    setting = f"{threads} thread{'s' * (threads > 1)}, {cache}"
    figure.suptitle(f"time of one module: bf16, r = 32, 10% of B nonzero, {setting}; bands are quartiles", fontsize=11)
    figure.savefig(file, dpi=130)


def _panel(panel: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    base = sorted({row["tokens"]: row["base_us"] for row in rows}.items())
    panel.plot(*zip(*base, strict=True), color="black", marker="s", markersize=3, label="base product")
    for popularity, colour in COLOURS.items():
        selected = sorted((row for row in rows if row["popularity"] == popularity), key=lambda row: row["tokens"])
        if not selected:
            continue
        tokens = [row["tokens"] for row in selected]
        panel.plot(
            tokens, [row["expand_us"] for row in selected], color=colour, marker="o", markersize=3, label=f"expand, {popularity}"
        )
        panel.fill_between(
            tokens, [r["expand_low_us"] for r in selected], [r["expand_high_us"] for r in selected], color=colour, alpha=0.2
        )
    selected = sorted((row for row in rows if row["popularity"] == "distinct"), key=lambda row: row["tokens"])
    dense = [(row["tokens"], row["dense_us"]) for row in selected if row["dense_us"] is not None]
    panel.plot(*zip(*dense, strict=True), color="tab:red", marker="o", markersize=3, label="dense gathered, distinct")
    panel.plot(
        [r["tokens"] for r in selected],
        [r["floor_us"] for r in selected],
        color="grey",
        ls=":",
        label="bytes / bandwidth, distinct",
    )
    panel.set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds")
    panel.set_xticks([row["tokens"] for row in selected], [str(row["tokens"]) for row in selected])
    panel.minorticks_off()
    panel.grid(alpha=0.25)
