"""Every error this package raises on purpose.

LoriError
├── ModelError            the base model cannot be found, fetched or used
├── DeviceError           the device that was asked for is not there, or cannot serve
├── TemplateError         a conversation cannot be written as a prompt
├── MaskError             too few entries are left for a mask
└── AdapterError
    ├── AdapterFormatError    a folder is not a sound adapter; carries every fault found
    ├── UnknownAdapterError   no adapter of that name; carries the near matches
    └── UnreachableError      the hub or a store cannot be reached just now
"""

from collections.abc import Sequence

MAX_SHOWN, MAX_CHARACTERS = 50, 300
"""Faults of an adapter that its error tells, and characters of each."""


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


class AdapterError(LoriError):
    """Root of what can be wrong with an adapter."""


class AdapterFormatError(AdapterError):
    """A folder is not a sound adapter: `faults` lists everything that was found."""

    def __init__(self, source: str, faults: Sequence[str]) -> None:
        self.source = source
        self.faults = tuple(faults)
        super().__init__(f"{source} is not a sound adapter: " + "; ".join(self.shown))

    @property
    def shown(self) -> tuple[str, ...]:
        """The first `MAX_SHOWN` faults, each cut to `MAX_CHARACTERS`, and how many more there are: for a reply or a log.

        A file of some megabytes can have a million faults, and quotes what is wrong with it.
        """
        cut = [fault if len(fault) <= MAX_CHARACTERS else f"{fault[:MAX_CHARACTERS]}…" for fault in self.faults[:MAX_SHOWN]]
        num_more = len(self.faults) - len(cut)
        return (*cut, *([f"and {num_more} more"] if num_more else []))

    @property
    def lines(self) -> list[str]:
        """The message, each fault on a line of its own."""
        return [f"{self.source} is not a sound adapter:", *(f"  {fault}" for fault in self.faults)]


class UnknownAdapterError(AdapterError):
    """No adapter is called `name`; `near` are known names that look like it."""

    def __init__(self, name: str, near: Sequence[str], known: Sequence[str]) -> None:
        self.name = name
        self.near = tuple(near)
        if near:
            hint = "did you mean " + " or ".join(repr(n) for n in near) + "?"
        elif known:
            hint = "known are " + ", ".join(repr(n) for n in known[:20]) + ("…" if len(known) > 20 else "")
        else:
            hint = "there are none at all"
        super().__init__(f"there is no adapter {name!r}: {hint}")


class UnreachableError(AdapterError):
    """The hub, or a store that lies elsewhere, cannot be reached just now."""
