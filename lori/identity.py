"""What an adapter must know of its base model, and nothing more: which one it is, and the shapes of its linear layers."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """A base model as an adapter's file sees it."""

    name: str = field(compare=False)
    """As a person would say it: it decides nothing."""
    digest: str
    """See `lori.base_identity`."""
    shapes: Mapping[str, tuple[int, int]]
    """(outputs, inputs) of every linear layer that can take a delta, by full name; see `lori.layer.module_shapes`."""
