"""The identity of a base model, and the shapes and names of its linear layers: all that an adapter must know of its base."""

from collections.abc import Mapping
from dataclasses import dataclass, field


def last(module: str) -> str:
    """Return the projection: `q_proj`."""
    return module.rpartition(".")[2]


def layer(module: str) -> str:
    """Return all up to the first number: `model.layers.3`; nothing where there is none."""
    parts = module.split(".")
    return ".".join(parts[: _end_of_layer(parts)])


def block(module: str) -> str:
    """Return what lies between the layer and the projection: `self_attn`."""
    parts = module.split(".")
    return ".".join(parts[_end_of_layer(parts) : -1])


def natural(module: str) -> list[tuple[bool, int, str]]:
    """Return a key that puts `layers.2` before `layers.10`."""
    return [(part.isdecimal(), len(part) if part.isdecimal() else 0, part) for part in module.split(".")]


def _end_of_layer(parts: list[str]) -> int:
    return next((i + 1 for i, part in enumerate(parts) if part.isdecimal()), 0)


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """A base model as an adapter's file sees it."""

    name: str = field(compare=False)
    """As a person would say it: it decides nothing."""
    digest: str
    """See `lori.base_identity`."""
    shapes: Mapping[str, tuple[int, int]]
    """(outputs, inputs) of every linear layer that can take a delta, by full name; see `lori.base_identity.module_shapes`."""
