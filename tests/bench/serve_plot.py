"""Plot of the server benchmark: tokens/s by case and by number of users."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

USERS = 32
"""Number of users in the first panel."""
COLOURS = {
    "lori-server": "tab:blue",
    "vLLM": "tab:orange",
    "llama.cpp": "tab:green",
    "PEFT": "tab:red",
    "transformers": "tab:purple",
}


def plot(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write a plot of tokens/s: of `USERS` users in each case, and by number of users. Error bars and bands are ranges."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    left_panel, right_panel = figure.subplots(1, 2, width_ratios=(3, 2))
    _bars(left_panel, [row for row in rows if row["concurrency"] == USERS] or rows)
    _lines(right_panel, [row for row in rows if row["concurrency"]])
    figure.savefig(file, dpi=130)


def _bars(panel: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    for index, row in enumerate(rows):
        low, high = row["tokens_per_s"] - row["tokens_per_s_low"], row["tokens_per_s_high"] - row["tokens_per_s"]
        panel.barh(index, row["tokens_per_s"], xerr=[[low], [high]], color=COLOURS.get(row["engine"], "grey"), alpha=0.85)
        panel.annotate(f" {row['tokens_per_s']:.0f}", (row["tokens_per_s_high"], index), va="center", fontsize=8)
    panel.set_yticks(range(len(rows)), [f"{row['engine']}: {row['case']}" for row in rows], fontsize=8)
    panel.invert_yaxis()
    panel.margins(x=0.12)
    panel.set(xlabel="tokens/s", title=f"{USERS} users")
    panel.grid(axis="x", alpha=0.25)


def _lines(panel: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    for key in dict.fromkeys((row["engine"], row["case"]) for row in rows):
        selected = sorted((row for row in rows if (row["engine"], row["case"]) == key), key=lambda row: row["concurrency"])
        users = [row["concurrency"] for row in selected]
        style = {"color": COLOURS.get(key[0], "grey"), "ls": "-" if selected[0]["adapters"] == 0 else "--"}
        if len(selected) == 1:
            continue
        panel.plot(users, [row["tokens_per_s"] for row in selected], marker="o", markersize=3, label=": ".join(key), **style)
        panel.fill_between(
            users,
            [r["tokens_per_s_low"] for r in selected],
            [r["tokens_per_s_high"] for r in selected],
            color=style["color"],
            alpha=0.1,
        )
    panel.set(xlabel="users", ylabel="tokens/s", title="by number of users")
    panel.grid(alpha=0.25)
    if panel.lines:
        panel.legend(fontsize=7, frameon=False)
