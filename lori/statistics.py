"""What one adapter is like, module by module: how much of B is kept and where, and how strong the delta is.

Shapes: D outputs, R rank, N inputs of a module. Norms are Frobenius norms, in fp64, of an adapter at weight 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lori.adapter import Adapter
from lori.inner_products import inner_products, module_order


@dataclass(frozen=True, slots=True)
class ModuleStatistics:
    """One module of an adapter."""

    module: str
    shape: tuple[int, int]
    """(D, R) of B."""
    num_kept: int
    """Entries of B that the mask keeps."""
    num_empty_rows: int
    """Outputs that get no delta."""
    num_empty_columns: int
    """Rows of A that no output reads."""
    max_row: int
    """Entries kept in the fullest row."""
    max_abs: float
    """The largest |(alpha/r) B|; zero where nothing is kept."""
    norm_b: float
    """|(alpha/r) B|."""
    norm_delta: float
    """|(alpha/r) B A|."""

    @property
    def num_rows(self) -> int:
        """D."""
        return self.shape[0]

    @property
    def num_entries(self) -> int:
        """D R."""
        return self.shape[0] * self.shape[1]

    @property
    def density(self) -> float:
        """The share of B's entries that is kept."""
        return self.num_kept / self.num_entries

    @property
    def empty_rows(self) -> float:
        """The share of outputs that get no delta."""
        return self.num_empty_rows / self.num_rows


@dataclass(frozen=True, slots=True)
class TotalStatistics:
    """All modules of an adapter together; the fields mean what they mean in `ModuleStatistics`."""

    num_modules: int
    num_entries: int
    num_kept: int
    num_rows: int
    num_empty_rows: int
    max_abs: float
    norm_b: float
    norm_delta: float

    @property
    def density(self) -> float:
        """The share of B's entries that is kept."""
        return self.num_kept / self.num_entries

    @property
    def empty_rows(self) -> float:
        """The share of outputs that get no delta."""
        return self.num_empty_rows / self.num_rows


def statistics(adapter: Adapter) -> list[ModuleStatistics]:
    """Returns the statistics of every module, by layer, then in the order of `target_modules`."""
    return [_module_statistics(adapter, module) for module in module_order([adapter])]


def total(modules: Sequence[ModuleStatistics]) -> TotalStatistics:
    """Returns the statistics of `modules`, at least one, together."""
    return TotalStatistics(
        num_modules=len(modules),
        num_entries=sum(row.num_entries for row in modules),
        num_kept=sum(row.num_kept for row in modules),
        num_rows=sum(row.num_rows for row in modules),
        num_empty_rows=sum(row.num_empty_rows for row in modules),
        max_abs=max(row.max_abs for row in modules),
        norm_b=math.hypot(*(row.norm_b for row in modules)),
        norm_delta=math.hypot(*(row.norm_delta for row in modules)),
    )


def _module_statistics(adapter: Adapter, module: str) -> ModuleStatistics:
    b = adapter.modules[module]
    scaled = adapter.config.scale_of(module) * b.values.double()
    row_counts = torch.bincount(b.rows, minlength=b.shape[0])
    column_counts = torch.bincount(b.indices.long() % b.shape[1], minlength=b.shape[1])
    return ModuleStatistics(
        module=module,
        shape=b.shape,
        num_kept=b.values.numel(),
        num_empty_rows=int((row_counts == 0).sum()),
        num_empty_columns=int((column_counts == 0).sum()),
        max_row=int(row_counts.max()),
        max_abs=float(scaled.abs().max()) if scaled.numel() else 0.0,
        norm_b=float(scaled.norm()),
        norm_delta=math.sqrt(inner_products([adapter], module)[0, 0]),
    )
