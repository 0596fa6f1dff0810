"""An adapter in memory: its config, its basis and its sparse B per module. Immutable."""

from collections.abc import Mapping
from dataclasses import dataclass

from lori.basis import Basis
from lori.config import AdapterConfig
from lori.sparse import SparseB

NUM_VERSION_DIGITS = 12


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
        """Returns (outputs, inputs) of `module`, which must be one that it changes."""
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
    def num_bytes(self) -> int:
        """What its B holds in memory, in bytes."""
        return sum(b.num_bytes for b in self.modules.values())
