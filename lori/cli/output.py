"""What the commands print: tables for people, JSON for scripts."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lori.adapter import Adapter
from lori.values import ValueType, rounding_error

WIDTH = 200
"""Columns of a table that no terminal shows: a file or a pipe cuts nothing."""


def print_json(document: Any) -> None:
    """Prints one JSON document."""
    print(json.dumps(document, indent=2, allow_nan=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Prints a table; columns whose cells are numbers are set to the right."""
    rows = list(rows)
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if all(_is_number(row[i]) for row in rows) else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    _console().print(table)


def print_fields(fields: Iterable[tuple[str, str]]) -> None:
    """Prints names and values, one pair a line."""
    grid = Table.grid(padding=(0, 2))
    for name, value in fields:
        grid.add_row(Text(name, style="bold"), Text(value))
    _console().print(grid)


def warn(message: str) -> None:
    """Says on stderr what the user should know."""
    print(f"warning: {message}", file=sys.stderr)


def say_rounding(adapter: Adapter, values: ValueType) -> None:
    """Says the error that storing B's values as `values` makes, where it makes one."""
    if error := rounding_error(adapter.modules.values(), values):
        print(f"values stored as {values} differ by {100 * error:.2g}% of B's norm")


def percent(share: float | None) -> str:
    """Returns a share as a percentage, or a dash."""
    return "–" if share is None else f"{100 * share:.1f}%"


def number(value: float | None, digits: int = 3) -> str:
    """Returns a number, or a dash."""
    return "–" if value is None else f"{value:.{digits}f}"


def size(num_bytes: float) -> str:
    """Returns a size in bytes in the unit that suits it."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def _is_number(cell: str) -> bool:
    return cell in ("", "–") or cell[0].isdecimal() or (cell[0] in "-." and cell[1:2].isdecimal())
