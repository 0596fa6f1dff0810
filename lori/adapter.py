"""An adapter in memory: its config, its basis and its sparse B per module. Immutable."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lori.basis import Basis
from lori.config import AdapterConfig
from lori.errors import AdapterError
from lori.names import NUM_VERSION_DIGITS
from lori.sparse import SparseB


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter: `modules` maps a module's full name in the base model to its B, trained on the frozen A of `basis`."""

    name: str
    config: AdapterConfig
    modules: Mapping[str, SparseB]
    basis: Basis

    @property
    def version(self) -> str:
        """The first digits of the content's digest: another content is another version."""
        return self.config.lori.content_digest[:NUM_VERSION_DIGITS]

    def shape_of(self, module: str) -> tuple[int, int]:
        """Return (outputs, inputs) of `module`, which must be one that it changes."""
        shape = self.config.shape_of(module)
        assert shape is not None
        return shape

    @property
    def num_kept(self) -> int:
        """Entries of B that exist, over all modules."""
        return sum(b.values.numel() for b in self.modules.values())

    @property
    def num_entries(self) -> int:
        """Entries that B would have without a mask, over all modules."""
        return sum(b.num_entries for b in self.modules.values())

    @property
    def density(self) -> float:
        """The share of B's entries that exist, over all modules."""
        return self.num_kept / self.num_entries

    @property
    def num_bytes(self) -> int:
        """What its B holds in memory, in bytes."""
        return sum(b.num_bytes for b in self.modules.values())


def common_shapes(adapters: Sequence[Adapter]) -> dict[str, tuple[int, int]]:
    """Return (outputs, inputs) of every module that any of `adapters` changes, by full name.

    Raises `AdapterError` with every fault where they are not of one base model, or differ in a module's shape.
    """
    shapes: dict[str, tuple[int, int]] = {}
    first = adapters[0]
    faults = [
        f"{adapter.name!r} is of {adapter.config.base_name}, expected {first.config.base_name} as {first.name!r} is"
        for adapter in adapters
        if adapter.config.lori.base_digest != first.config.lori.base_digest
    ]
    for adapter in adapters:
        for module in adapter.modules:
            if (shape := adapter.shape_of(module)) != shapes.setdefault(module, shape):
                faults.append(f"(outputs, inputs) of {module} are {shape} in {adapter.name!r}, expected {shapes[module]}")
    if faults:
        raise AdapterError("; ".join(faults))
    return shapes
