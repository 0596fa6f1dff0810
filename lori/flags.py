"""How a program says what is wrong with its flags."""

from collections.abc import Iterable, Sequence

from pydantic import ValidationError

from lori.names import near_names

REFUSED, UNKNOWN = "error parsing CLI: ", "unrecognized arguments: "
"""What pydantic-settings puts before argparse's words, and those that argparse has for what it does not know."""


def flag_of(field: str) -> str:
    """Returns the flag of a field."""
    return "--" + field.replace("_", "-")


def flag_faults(error: ValidationError) -> str:
    """Returns every fault of a settings class as its flags' faults, in one line."""
    faults = [("-".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")) for e in error.errors()]
    return "; ".join(f"{flag_of(field)}: {message}" if field else message for field, message in faults)


def refused_arguments(error: Exception, fields: Iterable[str]) -> str:
    """Returns in one line why the command line was refused; an unknown flag with that of `fields` which looks most like it."""
    said = str(error).removeprefix(REFUSED)
    if not said.startswith(UNKNOWN):
        return said
    known = [flag_of(field).removeprefix("--") for field in fields]
    unknown = [word.partition("=")[0] for word in said.removeprefix(UNKNOWN).split() if word.startswith("--")]
    return "; ".join(f"there is no flag {flag}: {_hint(flag, known)}" for flag in unknown) or said


def _hint(flag: str, known: Sequence[str]) -> str:
    near = near_names(flag.removeprefix("--"), known)
    return f"did you mean --{near[0]}?" if near else "--help lists them"
