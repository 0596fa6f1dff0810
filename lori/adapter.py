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
    """One adapter. `modules` maps a module's full name in the base model to its B; `basis` gives the frozen A of each."""

    name: str
    config: AdapterConfig
    modules: Mapping[str, SparseB]
    basis: Basis

    @property
    def version(self) -> str:
        """The first digits of the content digest: different content gives a different version."""
        return self.config.lori.content_digest[:NUM_VERSION_DIGITS]

    def shape_of(self, module: str) -> tuple[int, int]:
        """Return (outputs, inputs) of `module`, which the adapter must change."""
        shape = self.config.shape_of(module)
        assert shape is not None
        return shape

    @property
    def nnz(self) -> int:
        """Number of stored (nonzero) entries of B, over all modules."""
        return sum(b.values.numel() for b in self.modules.values())

    @property
    def num_entries(self) -> int:
        """Number of entries of B without a mask, over all modules."""
        return sum(b.num_entries for b in self.modules.values())

    @property
    def density(self) -> float:
        """Share of B's entries that are stored, over all modules."""
        return self.nnz / self.num_entries

    @property
    def num_bytes(self) -> int:
        """Bytes that B takes in memory, over all modules."""
        return sum(b.num_bytes for b in self.modules.values())


def common_shapes(adapters: Sequence[Adapter]) -> dict[str, tuple[int, int]]:
    """Return (outputs, inputs) of every module that any of `adapters` changes, by full name.

    Raises `AdapterError` with every fault if the adapters have different base models, or disagree on a module's shape.
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
