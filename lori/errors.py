"""Every error this package raises on purpose.

LoriError
├── ModelError            the base model cannot be found, fetched or used
├── DeviceError           the device that was asked for is not there, or cannot serve
├── TemplateError         a conversation cannot be written as a prompt
├── MaskError             too few entries are left for a mask
├── MergeCancelledError   a merge was given up before it was done
└── AdapterError
    ├── AdapterFormatError    a folder is not a sound adapter; carries every fault found
    ├── AliasError            an alias cannot be followed; carries what anybody may know of it
    ├── UnknownAdapterError   no adapter of that name; carries the near matches
    └── UnreachableError      the hub or a store cannot be reached just now
"""

import shlex
from collections.abc import Sequence

from lori.printable import printable

FOLDER = "FOLDER"
"""The adapter's folder, in a fault that says what to type. A client reads it so; who runs the program reads the path, see
`placed`."""
MAX_SHOWN, MAX_CHARACTERS = 50, 300
"""Faults of an adapter that its error tells, and characters of each."""
MAX_LISTED = 20
"""Known names that the error for an unknown one tells."""


def shortened(text: str) -> str:
    """Return the text, cut to `MAX_CHARACTERS`."""
    return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 1]}…"


def placed(fault: str, folder: str) -> str:
    """Return `fault` with the path `folder`, quoted for a shell, in the place of the first `FOLDER`: not for a client."""
    return fault.replace(FOLDER, shlex.quote(printable(folder)), 1)


def shown_faults(faults: Sequence[str]) -> tuple[str, ...]:
    """Return the first `MAX_SHOWN` faults, each shortened, and how many more there are."""
    num_more = len(faults) - MAX_SHOWN
    return (*map(shortened, faults[:MAX_SHOWN]), *([f"and {num_more} more"] if num_more > 0 else []))


class LoriError(Exception):
    """Root of the tree: catch it to catch all that `lori` raises on purpose."""


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
    """Root of what can be wrong with an adapter."""


class AdapterFormatError(AdapterError):
    """A folder is not a sound adapter: `faults` lists everything that was found, each in one line that may be printed.

    Where a fault says what to type, `FOLDER` stands for the folder; `placed` and the message have `source` there.
    """

    def __init__(self, source: str, faults: Sequence[str]) -> None:
        self.source = source
        self.faults = tuple(map(printable, faults))
        shown = "; ".join(placed(fault, source) for fault in self.shown)
        super().__init__(f"{printable(source)} is not a sound adapter: {shown}")

    @property
    def placed(self) -> tuple[str, ...]:
        """The faults as whoever runs the program may type what they say: not for a client."""
        return tuple(placed(fault, self.source) for fault in self.faults)

    @property
    def shown(self) -> tuple[str, ...]:
        """The first `MAX_SHOWN` faults, each cut to `MAX_CHARACTERS`, and how many more there are: for a reply or a log.

        A file of some megabytes can have a million faults, and quotes what is wrong with it.
        """
        return shown_faults(self.faults)

    @property
    def lines(self) -> list[str]:
        """The message, each fault on a line of its own."""
        return [f"{printable(self.source)} is not a sound adapter:", *(f"  {fault}" for fault in self.placed)]


class AliasError(AdapterError):
    """An alias cannot be followed; `brief` says why without what its file holds, which may name an adapter of somebody else."""

    def __init__(self, message: str, brief: str) -> None:
        self.brief = brief
        super().__init__(message)


class UnknownAdapterError(AdapterError):
    """No adapter is called `name`; `near` are known names that look like it, `listed` the first known names in words."""

    def __init__(self, name: str, near: Sequence[str], known: Sequence[str], hint: str = "") -> None:
        """`hint` says what to do, where more is known than names that look alike."""
        self.name = name
        self.near = tuple(near)
        self.listed = ", ".join(map(repr, known[:MAX_LISTED])) + ("…" if len(known) > MAX_LISTED else "")
        if near:
            said = "did you mean " + " or ".join(map(repr, near)) + "?"
        else:
            said = f"known are {self.listed}" if known else "there are none at all"
        super().__init__(f"there is no adapter {name!r}: {hint or said}")


class UnreachableError(AdapterError):
    """The hub, or a store that lies elsewhere, cannot be reached just now."""
