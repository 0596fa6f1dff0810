"""Command-line flags that all programs share: `--version`, and the messages for wrong flags."""

import re
import sys
from argparse import Action, HelpFormatter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_settings import SettingsError

from lori.names import MISSPELT, near_names

REFUSED, UNKNOWN = "error parsing CLI: ", "unrecognized arguments: "
"""Prefix that pydantic-settings puts before argparse's message, and argparse's message for unknown arguments."""
FLAG = re.compile(r"--?[A-Za-z]")
JOINED_HELP = re.compile(r"-h[A-Za-z]+")
"""Flags such as `-hf`, which argparse reads as `-h` with something behind it: it prints the help, or complains of that."""
STRAY = ""
"""Key of the hint for a value without a flag."""


PACKAGE = "lori-server"
NUM_COLUMNS = 80
"""Width of `--help`."""
LIST = re.compile(r"list\[(?P<type>.*)\]")
"""pydantic-settings' name for the value of a flag that may be repeated."""
NOTE = re.compile(r" \((required|default: .*)\)")
"""pydantic-settings' note at the end of a help text."""
METAVARS = {"JSON": "VALUE"}
"""Metavars for types whose name says too little: such a flag takes a text, or an object as JSON."""
REPEATED = " May be given several times."
UNSET = (" (default: null)", " (default: False)", " (default: [])", " (default: )")
"""Defaults that say only that a flag is absent, and are left out of `--help`."""


def package_version() -> str:
    """Return the version of this package as pip knows it; "unknown" if it is not installed."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return "unknown"


def show_version(is_asked: bool) -> None:
    """Print the version and end the program, if `is_asked`. The callback of typer's option `--version`."""
    if is_asked:
        print(PACKAGE, package_version())
        raise SystemExit(0)


def help_formatter(prog: str) -> HelpFormatter:
    """Return argparse's formatter of `--help`."""
    return HelpFormatter(prog, width=NUM_COLUMNS)


def add_argument(parser: Any, *names: str, **kwargs: Any) -> Action:
    """Add an argument to `parser`, or to a group of one, and `--version` after `--help`."""
    for unset in UNSET:
        kwargs["help"] = kwargs["help"].removesuffix(unset)
    if item := LIST.fullmatch(kwargs.get("metavar") or ""):
        text, mark, note = kwargs["help"].rpartition(" (")  # (required) or (default: …)
        help_text = f"{text}{REPEATED}{mark}{note}" if NOTE.fullmatch(mark + note) else kwargs["help"] + REPEATED
        kwargs |= {"metavar": METAVARS.get(item["type"], item["type"]), "help": help_text}
    action: Action = parser.add_argument(*names, **kwargs)
    if "--help" in names:
        text = f"{PACKAGE} {package_version()}"
        parser.add_argument("--version", action="version", version=text, help="show the version and exit")
    return action


class Headings:
    """Headings of `--help`, each with its fields, in order. A flag of no heading stands before them."""

    def __init__(self, fields: Mapping[str, Sequence[str]]) -> None:
        self._fields = fields
        self._groups: dict[str, Any] = {}

    def add_argument(self, parser: Any, *names: str, **kwargs: Any) -> Action:
        """Add an argument to `parser` under its heading. pydantic-settings calls this for every argument."""
        if not self._groups:  # all groups at once, so that their order does not depend on the flags
            self._groups = {heading: parser.add_argument_group(heading) for heading in self._fields}
        field = kwargs.get("dest", "")
        group = next((self._groups[heading] for heading, fields in self._fields.items() if field in fields), parser)
        return add_argument(group, *names, **kwargs)


@contextmanager
def refusing_flags(
    fields: Iterable[str], files: Callable[[], Mapping[str, Path]] = dict, hints: Mapping[str, str] | None = None
) -> Iterator[None]:
    """End the program with exit code 2 if the block raises for wrong settings; print one line that names the flag.

    For a setting from one of `files` the line names the key in that file. `hints` maps flags of other programs to advice.
    """
    try:
        if joined := [word for word in sys.argv[1:] if JOINED_HELP.fullmatch(word)]:
            raise SettingsError(UNKNOWN + " ".join(joined))
        yield
    except ValidationError as error:
        print(f"error: {flag_faults(error, files())}", file=sys.stderr)
        raise SystemExit(2) from error
    except SettingsError as error:
        print(f"error: {refused_arguments(error, fields, hints)}", file=sys.stderr)
        raise SystemExit(2) from error


def flag_of(field: str) -> str:
    """Return the flag of a field."""
    return "--" + field.replace("_", "-")


def flag_faults(error: ValidationError, files: Mapping[str, Path] | None = None) -> str:
    """Return every fault of a settings class in one line, each under its flag, or under its key in one of `files`."""
    faults = [(e["loc"], e["msg"].removeprefix("Value error, ")) for e in error.errors()]
    files = files or {}
    return "; ".join(f"{_place(loc, files)}: {message}" if loc else message + _sources(message, files) for loc, message in faults)


def _place(loc: Sequence[int | str], files: Mapping[str, Path]) -> str:
    if file := files.get(str(loc[0])):
        return f"{file}: {'.'.join(map(str, loc))}"
    return flag_of("-".join(map(str, loc)))


def _sources(message: str, files: Mapping[str, Path]) -> str:
    """Return a note on the flags named in `message` that came from one of `files`, with key and file; empty if none did."""
    named = re.findall(r"--[a-z][a-z-]*", message)
    keys = [f"{key} of {file}" for key, file in files.items() if flag_of(key) in named]
    return f" (these are {', '.join(keys)})" if keys else ""


def refused_arguments(error: Exception, fields: Iterable[str], hints: Mapping[str, str] | None = None) -> str:
    """Return the reason why the command line was refused, in one line.

    For an unknown flag the line gives its hint in `hints`, or else the most similar flag of `fields`.
    """
    message, hints = str(error).removeprefix(REFUSED), hints or {}
    if not message.startswith(UNKNOWN):
        return message
    known_flags = [flag_of(field).removeprefix("--") for field in fields]
    unknown = [word.partition("=")[0] for word in message.removeprefix(UNKNOWN).split() if FLAG.match(word)]
    if not unknown:
        return f"{message}: {hints[STRAY]}" if STRAY in hints else message
    return "; ".join(f"there is no flag {flag}: {_hint(flag, known_flags, hints)}" for flag in unknown)


def _hint(flag: str, known_flags: Sequence[str], hints: Mapping[str, str]) -> str:
    dashed = flag.replace("_", "-")  # argparse and vLLM accept both spellings
    if hint := hints.get(dashed):
        return hint
    near = near_names(dashed.lstrip("-"), known_flags, MISSPELT)
    return f"did you mean --{near[0]}?" if near else "--help lists them"
