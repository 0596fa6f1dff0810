"""An adapter in memory: its config and its sparse B per module. Immutable."""

from collections.abc import Mapping
from dataclasses import dataclass

from lori.basis import Basis
from lori.config import AdapterConfig
from lori.sparse import SparseB

NUM_VERSION_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter: `modules` maps a module's full name in the base model to its B."""

    name: str
    config: AdapterConfig
    modules: Mapping[str, SparseB]

    @property
    def version(self) -> str:
        """The first digits of the content's digest: another content is another version."""
        return self.config.lori.content_digest[:NUM_VERSION_DIGITS]

    @property
    def basis(self) -> Basis:
        """The frozen A that B was trained on."""
        return self.config.lori.basis.basis()

    @property
    def num_kept(self) -> int:
        """Entries of B that exist, over all modules."""
        return sum(b.values.numel() for b in self.modules.values())
