"""Which adapters can be served by what was prepared at start: A is in the model's products, and the operands have a rank."""

from dataclasses import dataclass

from lori.config import AdapterConfig, ExplicitConfig, SeededConfig, basis_config
from lori.pool import AdapterPool
from lori.summary import Summary
from server.errors import ConflictError


@dataclass(frozen=True, slots=True)
class Fit:
    """The bases and the greatest rank that the server was started for."""

    bases: tuple[SeededConfig | ExplicitConfig, ...]
    max_rank: int

    @classmethod
    def of(cls, pool: AdapterPool) -> "Fit":
        """Return what `pool` was made for."""
        return cls(tuple(map(basis_config, pool.bases)), pool.rank)

    def check(self, name: str, of: Summary | AdapterConfig) -> None:
        """Raise `ConflictError`, with what was found, what was expected, and what helps, where an adapter cannot be served."""
        basis, rank = (
            (of.basis, of.max_rank) if isinstance(of, Summary) else (of.lori.basis, max(of.r, *of.rank_pattern.values(), 0))
        )
        faults = []
        if basis not in self.bases:
            expected = " or ".join(f"({known})" for known in self.bases) or "none"
            faults.append(
                f"it is on the basis ({basis}), expected {expected}: bases are prepared at start, for the adapters that are "
                "in --adapters then: put it there (`python -m lori import` does), and start the server again"
            )
        if rank > self.max_rank:
            faults.append(f"it has rank {rank}, expected {self.max_rank} at most: start the server with --max-rank {rank}")
        if faults:
            raise ConflictError(f"{name!r} cannot be served now: {'; '.join(faults)}")
