"""Hints for a name that is neither an adapter nor the base model. They only use what the caller may see."""

import re
from collections.abc import Callable

from lori.errors import UnknownAdapterError
from lori.names import AUTO, MISSPELT, near_names
from server.schemas.model_names import UnknownModelError, find_parts

SEPARATORS = re.compile(r"[\s+,;|&]+")
IsKnown = Callable[[str], bool]
"""Function that returns whether there is an adapter of this name that the caller may use."""


def unknown_model(
    model: str, error: UnknownAdapterError, base_model: str, is_known: IsKnown, *, kinds: str = "adapters", has_auto: bool = False
) -> UnknownModelError:
    """Return the error for a `model` of which one part, `error.name`, is no adapter.

    `kinds` says what `error` lists, and `has_auto` whether the server selects adapters for the model `auto`.
    """
    is_whole, names = error.name.strip() == model.strip(), _names_in(model, is_known)
    if _looks_like(model, base_model):
        hint = f"Did you mean {base_model!r}, the base model?"
    elif len(names) > 1:
        hint = f"Did you mean {'+'.join(names)!r}?"
    elif is_whole and error.near:
        hint = f"Did you mean {' or '.join(map(repr, error.near))}?"
    elif is_whole:
        models = [f"the base model {base_model!r}", *([repr(AUTO)] if has_auto else [])]
        models += [f"the {kinds} {error.listed}"] if error.listed else []
        hint = f"There are {', '.join(models[:-1])} and {models[-1]}." if len(models) > 1 else f"There are {models[0]} alone."
    else:
        text = str(error)
        hint = text[:1].upper() + text[1:]
    return UnknownModelError(model, hint)


def unknown_adapter(
    error: UnknownAdapterError, field: str, base_model: str, is_known: IsKnown, *, is_of_base: bool
) -> UnknownAdapterError:
    """Return the error for an unknown adapter in `field`: `error` itself, or one with a hint about its name."""
    reference = error.name
    if is_of_base or _looks_like(reference, base_model):
        return UnknownAdapterError(reference, (), (), f"leave {field!r} out for the base model, {base_model!r}")
    names = _names_in(reference, is_known)
    weights = [part["weight"].replace("auto", '"auto"') for part in find_parts(reference) if part and part["weight"]]
    if not names or (len(names) == 1 and not weights):
        return error
    listed = ", ".join(f'"{name}"' for name in names)
    beside = f" with 'weights': [{', '.join(weights)}]" if len(weights) == len(names) else ""
    return UnknownAdapterError(reference, (), (), f"use {field!r}: [{listed}]{beside}")


def _names_in(reference: str, is_known: IsKnown) -> list[str]:
    # The adapters in `reference`, whatever separates them. Empty if it names anything else.
    pieces = [piece.partition(":")[0] for piece in SEPARATORS.split(reference.strip())]
    return pieces if all(map(is_known, pieces)) else []


def _looks_like(name: str, base_model: str) -> bool:
    requested, base = name.strip().lower(), base_model.lower()
    return bool(near_names(requested, [base], MISSPELT)) or requested.rpartition("/")[2] == base.rpartition("/")[2]
