"""What an adapter may be called, and what is said of a name that nobody knows."""

import difflib
import re
from collections.abc import Iterable

from lori.errors import AdapterError, UnknownAdapterError

NUM_VERSION_DIGITS = 12
"""Of a digest, where a person reads it."""
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
VERSION = re.compile(rf"[0-9a-f]{{1,{NUM_VERSION_DIGITS}}}")


def check_name(name: str) -> None:
    """Raises `AdapterError` where `name` is not one that an adapter may have."""
    if not NAME.fullmatch(name):
        raise AdapterError(f"{name!r} is no adapter's name: it must match {NAME.pattern}")


def split_reference(reference: str) -> tuple[str, str]:
    """Returns name and version of `name` or `name@version`; the version may be cut short, or empty.

    Raises `AdapterError` for what is neither.
    """
    name, at, version = reference.partition("@")
    check_name(name)
    if at and not VERSION.fullmatch(version):
        raise AdapterError(f"{reference!r} has the version {version!r}, expected up to {NUM_VERSION_DIGITS} hexadecimal digits")
    return name, version


def unknown_adapter(name: str, known: Iterable[str]) -> UnknownAdapterError:
    """Returns the error for an unknown `name`, with the known names that look like it."""
    known = sorted(known)
    return UnknownAdapterError(name, difflib.get_close_matches(name, known, n=3, cutoff=0.5), known)
