"""What an adapter may be called, what a base is called, and what is said of a name that nobody knows. Imports no torch."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from rapidfuzz import process
from rapidfuzz.distance import Indel

from lori.errors import AdapterError, UnknownAdapterError

EMBEDDED_NAME = "SmolLM2-135M-Instruct"
EMBEDDED_HUB_ID = f"HuggingFaceTB/{EMBEDDED_NAME}"
NUM_VERSION_DIGITS = 12
"""Of a digest, where a person reads it."""
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
VERSION = re.compile(rf"[0-9a-f]{{1,{NUM_VERSION_DIGITS}}}")
NUM_NEAR = 3
NEAR = 0.6
"""What a name shares with another that is meant by it: twice the letters in common, in order, of those of both."""
MISSPELT = 0.75
"""The same for flags and fields: there is one for each purpose, and one that only looks alike leads astray."""


def short_name(base: str) -> str:
    """Return what a person calls a base model: a folder's last part, or the hub id."""
    return Path(base).name if Path(base).is_dir() else base


def base_aliases(base: str | None) -> frozenset[str]:
    """Return what else names the base model `base`, beside `short_name`: a folder's paths, or the embedded model's hub id."""
    if base is None:
        return frozenset((EMBEDDED_HUB_ID,))
    folder = Path(base)
    return frozenset((base.rstrip("/"), str(folder.absolute()), str(folder.resolve()))) if folder.is_dir() else frozenset()


def check_name(name: str) -> None:
    """Raise `AdapterError` where `name` is not one that an adapter may have."""
    if not NAME.fullmatch(name):
        raise AdapterError(f"{name!r} is no adapter's name: it must match {NAME.pattern}")


def name_fault(folder: Path) -> str:
    """Return the fault of a folder that holds an adapter, and is called as none may be."""
    return f"{folder}: an adapter's name must match {NAME.pattern}: rename the folder"


def split_reference(reference: str) -> tuple[str, str]:
    """Return name and version of `name` or `name@version`; the version may be cut short, or empty.

    Raises `AdapterError` for what is neither.
    """
    name, at, version = reference.partition("@")
    check_name(name)
    if at and not VERSION.fullmatch(version):
        raise AdapterError(f"{reference!r} has the version {version!r}, expected up to {NUM_VERSION_DIGITS} hexadecimal digits")
    return name, version


def unknown_adapter(reference: str, known: Iterable[str]) -> UnknownAdapterError:
    """Return the error for an unknown `name` or `name@version`, with the known names that look like it.

    Of a path or a hub id the last part counts.
    """
    known, name = sorted(known), reference.partition("@")[0].lower()
    return UnknownAdapterError(reference, near_names(name.rpartition("/")[2], known), known)


def near_names(name: str, known: Sequence[str], cutoff: float = NEAR) -> list[str]:
    """Return those of `known` that look like `name`, the nearest first. Takes about 1 ms for 10,000 names."""
    near = process.extract(name, known, scorer=Indel.normalized_similarity, score_cutoff=cutoff, limit=NUM_NEAR)
    return [found for found, *_ in near]
