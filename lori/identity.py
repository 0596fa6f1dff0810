"""The identity of a base model, and the shapes and names of its linear layers: all that an adapter needs from its base."""

from collections.abc import Mapping
from dataclasses import dataclass, field


def projection_of(module: str) -> str:
    """Return the last part of a module's full name: `q_proj`."""
    return module.rpartition(".")[2]


def layer_of(module: str) -> str:
    """Return the part of a module's full name up to the first number: `model.layers.3`. Empty if there is no number."""
    parts = module.split(".")
    return ".".join(parts[: _end_of_layer(parts)])


def submodule_of(module: str) -> str:
    """Return the part of a module's full name between the layer and the projection: `self_attn`."""
    parts = module.split(".")
    return ".".join(parts[_end_of_layer(parts) : -1])


def natural_key(module: str) -> list[tuple[bool, int, str]]:
    """Return a sort key that puts `layers.2` before `layers.10`."""
    return [(part.isdecimal(), len(part) if part.isdecimal() else 0, part) for part in module.split(".")]


def _end_of_layer(parts: list[str]) -> int:
    return next((i + 1 for i, part in enumerate(parts) if part.isdecimal()), 0)


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """A base model as an adapter's file describes it."""

    name: str = field(compare=False)
    """Name for people; comparisons ignore the name."""
    digest: str
    """Digest of the architecture and the weights, see `lori.base_identity`."""
    shapes: Mapping[str, tuple[int, int]]
    """(outputs, inputs) of every linear layer that can take a delta, by full name; see `lori.base_identity.module_shapes`."""
