"""What all programs share of their flags: `--version`, and how they say what is wrong."""

import re
import sys
from argparse import Action, ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_settings import SettingsError

from lori.names import MISSPELT, near_names

REFUSED, UNKNOWN = "error parsing CLI: ", "unrecognized arguments: "
"""What pydantic-settings puts before argparse's words, and those that argparse has for what it does not know."""
FLAG = re.compile(r"--?[A-Za-z]")
STRAY = ""
"""The key of the hint for a value without a flag."""


PACKAGE = "lori-server"


def package_version() -> str:
    """Return the version of this package as pip knows it; "unknown" where it was not installed."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return "unknown"


def add_argument(parser: ArgumentParser, *names: str, **kwargs: Any) -> Action:
    """Add an argument to `parser` as argparse does, and `--version` after `--help`; pydantic-settings adds all of them so."""
    action = parser.add_argument(*names, **kwargs)
    if "--help" in names:
        text = f"{PACKAGE} {package_version()}"
        parser.add_argument("--version", action="version", version=text, help="show the version and exit")
    return action


@contextmanager
def refusing_flags(
    fields: Iterable[str], files: Callable[[], Mapping[str, Path]] = dict, hints: Mapping[str, str] | None = None
) -> Iterator[None]:
    """End the program with 2, and a line that names the flag, or the key of one of `files`, where the block finds one wrong.

    `hints` are what to do instead of flags that other programs have.
    """
    try:
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
    """Return every fault of a settings class as its flags' faults, or those of a key of one of `files`, in one line."""
    faults = [(e["loc"], e["msg"].removeprefix("Value error, ")) for e in error.errors()]
    files = files or {}
    return "; ".join(f"{_place(loc, files)}: {message}" if loc else message + _sources(message, files) for loc, message in faults)


def _place(loc: Sequence[int | str], files: Mapping[str, Path]) -> str:
    if file := files.get(str(loc[0])):
        return f"{file}: {'.'.join(map(str, loc))}"
    return flag_of("-".join(map(str, loc)))


def _sources(message: str, files: Mapping[str, Path]) -> str:
    """Says which of the flags that `message` names stand in one of `files`, as which key."""
    named = re.findall(r"--[a-z][a-z-]*", message)
    keys = [f"{key} of {file}" for key, file in files.items() if flag_of(key) in named]
    return f" (these are {', '.join(keys)})" if keys else ""


def refused_arguments(error: Exception, fields: Iterable[str], hints: Mapping[str, str] | None = None) -> str:
    """Return in one line why the command line was refused.

    An unknown flag is told with its hint, or else with that of `fields` which looks most like it.
    """
    said, hints = str(error).removeprefix(REFUSED), hints or {}
    if not said.startswith(UNKNOWN):
        return said
    known = [flag_of(field).removeprefix("--") for field in fields]
    unknown = [word.partition("=")[0] for word in said.removeprefix(UNKNOWN).split() if FLAG.match(word)]
    if not unknown:
        return f"{said}: {hints[STRAY]}" if STRAY in hints else said
    return "; ".join(f"there is no flag {flag}: {_hint(flag, known, hints)}" for flag in unknown)


def _hint(flag: str, known: Sequence[str], hints: Mapping[str, str]) -> str:
    written = flag.replace("_", "-")  # argparse and vLLM know both
    if hint := hints.get(written):
        return hint
    near = near_names(written.lstrip("-"), known, MISSPELT)
    return f"did you mean --{near[0]}?" if near else "--help lists them"
