"""Every error this package raises on purpose.

LoriError
├── ModelError            the base model cannot be found, fetched or used
├── DeviceError           the device that was asked for is not there, or cannot serve
├── TemplateError         a conversation cannot be written as a prompt
├── MaskError             too few entries are left for a mask
├── MergeCancelledError   a merge was given up before it was done
└── AdapterError
    ├── AdapterFormatError    a folder is not a sound adapter; carries every fault found
    ├── AliasError            an alias cannot be followed; carries a short reason that anyone may see
    ├── UnknownAdapterError   no adapter of that name; carries the near matches
    └── UnreachableError      the hub or a store cannot be reached just now
"""

import shlex
from collections.abc import Sequence

from lori.printable import printable

FOLDER = "FOLDER"
"""Placeholder for the adapter's folder in a fault that quotes a command. Clients see the placeholder; the operator sees the path,
see `with_path`."""
MAX_SHOWN, MAX_CHARACTERS = 50, 300
"""Maximum number of an adapter's faults that its error shows, and of characters of each."""
MAX_LISTED = 20
"""Maximum number of known names that the error for an unknown name lists."""


def shortened(text: str) -> str:
    """Return the text, cut to `MAX_CHARACTERS`."""
    return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 1]}…"


def with_path(fault: str, folder: str) -> str:
    """Return `fault` with the first `FOLDER` replaced by the path `folder`, quoted for a shell. Not for clients."""
    return fault.replace(FOLDER, shlex.quote(printable(folder)), 1)


def shown_faults(faults: Sequence[str]) -> tuple[str, ...]:
    """Return the first `MAX_SHOWN` faults, each shortened, and a line with the number of the others."""
    num_more = len(faults) - MAX_SHOWN
    return (*map(shortened, faults[:MAX_SHOWN]), *([f"and {num_more} more"] if num_more > 0 else []))


class LoriError(Exception):
    """Root of the tree: catches everything that `lori` raises on purpose."""


class ModelError(LoriError):
    """The base model cannot be found, fetched or used."""


class DeviceError(LoriError):
    """The device that was asked for is not there, or cannot serve."""


class TemplateError(LoriError):
    """A conversation cannot be written as a prompt with the asked template."""


class MaskError(LoriError):
    """Too few entries are left for a mask."""


class MergeCancelledError(LoriError):
    """A merge was given up before it was done, as its caller asked."""


class AdapterError(LoriError):
    """Root of all errors about adapters."""


class AdapterFormatError(AdapterError):
    """A folder is not a sound adapter: `faults` lists everything that is wrong, each as one printable line.

    `FOLDER` stands for the folder in a fault that quotes a command; `faults_with_path` and the message have `source` there.
    """

    def __init__(self, source: str, faults: Sequence[str]) -> None:
        self.source = source
        self.faults = tuple(map(printable, faults))
        shown = "; ".join(with_path(fault, source) for fault in self.shown)
        super().__init__(f"{printable(source)} is not a sound adapter: {shown}")

    @property
    def faults_with_path(self) -> tuple[str, ...]:
        """The faults with the real path in the commands they quote. For the operator, not for clients."""
        return tuple(with_path(fault, self.source) for fault in self.faults)

    @property
    def shown(self) -> tuple[str, ...]:
        """The first `MAX_SHOWN` faults, each cut to `MAX_CHARACTERS`, and the number of the others. For a reply or a log.

        The cut is needed: a file of a few megabytes can have a million faults, and faults quote the file.
        """
        return shown_faults(self.faults)

    @property
    def lines(self) -> list[str]:
        """The message, each fault on a line of its own."""
        return [f"{printable(self.source)} is not a sound adapter:", *(f"  {fault}" for fault in self.faults_with_path)]


class AliasError(AdapterError):
    """An alias cannot be followed. `brief` is the reason without the alias file's content, which may name a foreign adapter."""

    def __init__(self, message: str, brief: str) -> None:
        self.brief = brief
        super().__init__(message)


class UnknownAdapterError(AdapterError):
    """No adapter is called `name`. `near` holds similar known names; `listed` is a text with the first known names."""

    def __init__(self, name: str, near: Sequence[str], known_names: Sequence[str], hint: str = "") -> None:
        """Make the error. `hint` replaces the suggestion of similar names, for callers that know a better remedy."""
        self.name = name
        self.near = tuple(near)
        self.listed = ", ".join(map(repr, known_names[:MAX_LISTED])) + ("…" if len(known_names) > MAX_LISTED else "")
        if near:
            advice = "did you mean " + " or ".join(map(repr, near)) + "?"
        else:
            advice = f"known are {self.listed}" if known_names else "there are none at all"
        super().__init__(f"there is no adapter {name!r}: {hint or advice}")


class UnreachableError(AdapterError):
    """The hub, or a store on another machine, cannot be reached just now."""
