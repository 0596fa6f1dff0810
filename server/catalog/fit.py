"""Checks that an adapter can be served with what was prepared at start: the bases in the model's products, the operands' rank."""

from dataclasses import dataclass

from lori.config import AdapterConfig, ExplicitConfig, SeededConfig, basis_config
from lori.pool import AdapterPool
from lori.summary import Summary
from server.errors import ConflictError


@dataclass(frozen=True, slots=True)
class Fit:
    """The bases and the highest rank that the server was started for."""

    bases: tuple[SeededConfig | ExplicitConfig, ...]
    max_rank: int

    @classmethod
    def from_pool(cls, pool: AdapterPool) -> "Fit":
        """Return the bases and the rank of `pool`."""
        return cls(tuple(map(basis_config, pool.bases)), pool.rank)

    def check(self, name: str, adapter: Summary | AdapterConfig) -> None:
        """Raise `ConflictError` if an adapter cannot be served. The message has the faults, the expected values and a remedy."""
        basis, rank = (
            (adapter.basis, adapter.max_rank)
            if isinstance(adapter, Summary)
            else (adapter.lori.basis, max(adapter.r, *adapter.rank_pattern.values(), 0))
        )
        faults = []
        if basis not in self.bases:
            expected = " or ".join(f"({config})" for config in self.bases) or "none"
            faults.append(
                f"it is on the basis ({basis}), expected {expected}: bases are prepared at start, for the adapters that are "
                "in --adapters then: put it there (`python -m lori import` does), and start the server again"
            )
        if rank > self.max_rank:
            faults.append(f"it has rank {rank}, expected {self.max_rank} at most: start the server with --max-rank {rank}")
        if faults:
            raise ConflictError(f"{name!r} cannot be served now: {'; '.join(faults)}")
