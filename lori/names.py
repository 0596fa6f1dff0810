"""Names of adapters and base models, and suggestions for unknown names. Imports no torch."""

import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from pathlib import Path

from rapidfuzz import process
from rapidfuzz.distance import Indel

from lori.errors import AdapterError, UnknownAdapterError

EMBEDDED_NAME = "SmolLM2-135M-Instruct"
EMBEDDED_HUB_ID = f"HuggingFaceTB/{EMBEDDED_NAME}"
NUM_VERSION_DIGITS = 12
"""Number of digits of a digest that people see."""
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
AUTO = "auto"
"""The name by which requests ask for the adapters that the server chooses."""
RESERVED = "is reserved: requests for it let the server choose the adapters"
VERSION = re.compile(rf"[0-9a-f]{{1,{NUM_VERSION_DIGITS}}}")
NUM_NEAR = 3
NEAR = 0.6
"""Lowest similarity of a suggested name: twice the number of letters in common (in order), divided by the letters of both."""
MISSPELT = 0.75
"""The same for flags and fields. Higher, since a flag that only looks similar does something else and misleads."""


def short_name(base: str) -> str:
    """Return a base model's name for people: the last part of a folder's path, or the hub id."""
    return Path(base).name if Path(base).is_dir() else base


def base_aliases(base: str | None) -> frozenset[str]:
    """Return the names of the base model `base` besides `short_name`: the paths of its folder, or the embedded model's hub id."""
    if base is None:
        return frozenset((EMBEDDED_HUB_ID,))
    folder = Path(base)
    return frozenset((base.rstrip("/"), str(folder.absolute()), str(folder.resolve()))) if folder.is_dir() else frozenset()


def is_name(name: str) -> bool:
    """Return whether an adapter may have this `name`."""
    return bool(NAME.fullmatch(name)) and name != AUTO


def is_reference(text: str) -> bool:
    """Return whether `text` is `name` or `name@version`."""
    name, at, version = text.partition("@")
    return is_name(name) and (not at or bool(VERSION.fullmatch(version)))


def check_name(name: str) -> None:
    """Raise `AdapterError` if an adapter must not have this `name`."""
    if name == AUTO:
        raise AdapterError(f"{AUTO!r} {RESERVED}")
    if not NAME.fullmatch(name):
        raise AdapterError(f"{name!r} is no adapter's name: it must match {NAME.pattern}")


def name_fault(folder: Path) -> str:
    """Return the fault of an adapter's folder whose name no adapter may have."""
    rule = f"{AUTO!r} {RESERVED}" if folder.name.partition("@")[0] == AUTO else f"an adapter's name must match {NAME.pattern}"
    return f"{folder}: {rule}: rename the folder"


def weight_text(weight: float) -> str:
    """Return a weight as a `model`'s name has it, in all its digits and without an exponent."""
    return f"{Decimal(repr(weight)).normalize():f}"


def split_reference(reference: str) -> tuple[str, str]:
    """Return name and version of the reference `name` or `name@version`. The version may be a prefix, or empty.

    Raises `AdapterError` if `reference` has neither form.
    """
    name, at, version = reference.partition("@")
    check_name(name)
    if at and not VERSION.fullmatch(version):
        raise AdapterError(f"{reference!r} has the version {version!r}, expected up to {NUM_VERSION_DIGITS} hexadecimal digits")
    return name, version


def unknown_adapter(reference: str, known_names: Iterable[str]) -> UnknownAdapterError:
    """Return the error for an unknown `name` or `name@version`, with the most similar known names.

    For a path or a hub id only the last part is compared.
    """
    known_names, name = sorted(known_names), reference.partition("@")[0].lower()
    return UnknownAdapterError(reference, near_names(name.rpartition("/")[2], known_names), known_names)


def near_names(name: str, known_names: Sequence[str], cutoff: float = NEAR) -> list[str]:
    """Return the names most similar to `name`, the most similar first. Takes about 1 ms for 10,000 names."""
    matches = process.extract(name, known_names, scorer=Indel.normalized_similarity, score_cutoff=cutoff, limit=NUM_NEAR)
    return [match for match, *_ in matches]
