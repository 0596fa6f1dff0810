"""The program `python -m lori`: its commands, exit codes and error messages."""

import io
import sys
from typing import Annotated

import typer

from lori.cli import inspection, merging, stores, transfer
from lori.errors import AdapterFormatError, LoriError
from lori.flags import show_version
from lori.printable import printable

PROGRAM = "python -m lori"

app = typer.Typer(
    help=(
        "Adapters on this machine. An ADAPTER is a folder, or `store/name`, or `store/name@version`. "
        "Exit codes: 0 fine, 1 something is wrong, 2 the options are."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for module in (inspection, merging, stores, transfer):
    for command in module.COMMANDS:
        app.command(command.__name__.rstrip("_"))(command)


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> int:
    """Run the program and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # tables use characters that some terminals cannot encode
    try:
        app(prog_name=PROGRAM)
    except AdapterFormatError as error:
        print("error: " + "\n".join(error.lines), file=sys.stderr)
        return 1
    except (LoriError, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 1
    return 0
