"""Output of the commands: tables for people, JSON for scripts."""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lori.adapter import Adapter
from lori.printable import printable
from lori.store.entry import Entry

NUMBER = re.compile(r"|–|-?[\d.e+-]+( ?(%|B|kB|MB|GB|TB))?")
UNBROKEN = ("name", "version", "bytes", "density", "rank")
"""Columns that keep their width on a narrow terminal."""
WIDTH = 200
"""Width, in characters, of a table that goes to a file or a pipe."""


def print_json(document: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(document, indent=2, allow_nan=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print a table. Columns of numbers are aligned right."""
    rows = list(rows)
    table = Table(
        title=Text(printable(title)) if title else None,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for i, column in enumerate(columns):
        is_number = column != "version" and all(_is_number(row[i]) for row in rows)
        table.add_column(column, justify="right" if is_number else "left", overflow="fold", no_wrap=column in UNBROKEN)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    _console().print(table)


def print_fields(fields: Iterable[tuple[str, str]]) -> None:
    """Print names and values, one pair per line."""
    grid = Table.grid(padding=(0, 2))
    for name, value in fields:
        grid.add_row(Text(printable(name), style="bold"), Text(printable(value)))
    _console().print(grid)


def print_made(entry: Entry, adapter: Adapter, notes: dict[str, float | list[str]], as_json: bool) -> None:
    """Print the adapter that a command published: its reference, its size, and `notes`, which are named errors or lists."""
    num_bytes = folder_bytes(entry.folder)
    if as_json:
        document = {"name": entry.name, "version": entry.version, "folder": str(entry.folder), "bytes": num_bytes}
        print_json(document | {"density": adapter.density} | notes)
        return
    for name, value in notes.items():
        if value:
            text = f"{100 * value:.2g}%" if isinstance(value, float) else ", ".join(value)
            print(f"{name.replace('_', ' ')}: {printable(text)}")
    print(f"published {entry.reference}: {percent(adapter.density)} of B kept, {size(num_bytes)}")


def warn(message: str) -> None:
    """Print a warning to stderr."""
    print(f"warning: {printable(message)}", file=sys.stderr)


def percent(share: float | None) -> str:
    """Return a share as a percentage, or a dash."""
    return "–" if share is None else f"{100 * share:.1f}%"


def number(value: float | None) -> str:
    """Return a number with three decimals, or a dash."""
    return "–" if value is None else f"{value:.3f}"


def size(num_bytes: float) -> str:
    """Return a size in the largest fitting unit from B to TB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def folder_bytes(folder: Path) -> int:
    """Return the total size of the files in an adapter's folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def _is_number(cell: str) -> bool:
    return bool(NUMBER.fullmatch(cell))
