"""Statistics of an adapter by module: the density of B, its empty rows, and the norm of the delta.

Shapes: D outputs, R rank, N inputs of a module. Norms are Frobenius norms, in fp64, of an adapter at weight 1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lori.adapter import Adapter
from lori.compare.pairs import inner_products, module_order


@dataclass(frozen=True, slots=True)
class ModuleStatistics:
    """Statistics of one module of an adapter, or of all modules together. The fields' names are JSON keys."""

    module: str
    """Full name; empty for the total."""
    num_rows: int
    """Number of outputs, D."""
    num_entries: int
    """Number of entries of the dense B, D R."""
    num_kept: int
    """Number of nonzero entries of B."""
    num_empty_rows: int
    """Number of outputs without a nonzero entry of B."""
    max_abs: float
    """Largest |(alpha/r) B|; zero if B has no nonzero entry."""
    norm_b: float
    """|(alpha/r) B|."""
    norm_delta: float
    """|(alpha/r) B A|."""

    @property
    def density(self) -> float:
        """Share of B's entries that are nonzero."""
        return self.num_kept / self.num_entries

    @property
    def empty_rows(self) -> float:
        """Share of outputs without a nonzero entry of B."""
        return self.num_empty_rows / self.num_rows


def statistics(adapter: Adapter, pause: Callable[[], None] = lambda: None) -> list[ModuleStatistics]:
    """Return the statistics of every module, by layer, then in the order of `target_modules`.

    `pause` is called after each module, so that the caller can yield the CPU to other work.
    """
    rows = []
    for module in module_order([adapter]):
        rows.append(_module_statistics(adapter, module))
        pause()
    return rows


def total(modules: Sequence[ModuleStatistics]) -> ModuleStatistics:
    """Return the total of the statistics of `modules`, at least one."""
    return ModuleStatistics(
        module="",
        num_rows=sum(row.num_rows for row in modules),
        num_entries=sum(row.num_entries for row in modules),
        num_kept=sum(row.num_kept for row in modules),
        num_empty_rows=sum(row.num_empty_rows for row in modules),
        max_abs=max(row.max_abs for row in modules),
        norm_b=math.hypot(*(row.norm_b for row in modules)),
        norm_delta=math.hypot(*(row.norm_delta for row in modules)),
    )


def _module_statistics(adapter: Adapter, module: str) -> ModuleStatistics:
    b = adapter.modules[module]
    scaled = adapter.config.scale_of(module) * b.values.double()
    return ModuleStatistics(
        module=module,
        num_rows=b.shape[0],
        num_entries=b.num_entries,
        num_kept=b.values.numel(),
        num_empty_rows=b.shape[0] - len(b.rows.unique()),
        max_abs=float(scaled.abs().max()) if scaled.numel() else 0.0,
        norm_b=float(scaled.norm()),
        norm_delta=math.sqrt(inner_products([adapter], module)[0, 0]),
    )
