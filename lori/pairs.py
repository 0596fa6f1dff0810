"""Many adapters compared at once, pair by pair, as `lori.compare` has it for two: each A is drawn once for all of them."""

from collections.abc import Callable, Sequence

import numpy as np

from lori.adapter import Adapter, common_shapes
from lori.compare import CommonEntries, ModuleComparison, common_entries
from lori.inner_products import inner_products, module_order


def compare_pairs(
    adapters: Sequence[Adapter], pairs: Sequence[tuple[int, int]], rest: Callable[[], None] = lambda: None
) -> list[ModuleComparison]:
    """Returns the total of each of `pairs`, which are places in `adapters`; `square_sum` is at weights 1 and 1.

    `rest` is called after each module: whoever shares the machine with others may pause there. Raises as `compare`.
    """
    common_shapes(adapters)  # or it makes no sense
    inner = np.zeros((len(adapters), len(adapters)))
    common: list[list[CommonEntries]] = [[] for _ in pairs]
    for module in module_order(adapters):
        inner += inner_products(adapters, module)
        for parts, (i, j) in zip(common, pairs, strict=True):
            if part := common_entries(adapters[i], adapters[j], module):
                parts.append(part)
        rest()
    return [
        ModuleComparison(
            module="",
            num_a=adapters[i].num_kept,
            num_b=adapters[j].num_kept,
            common=CommonEntries.total(parts) if parts else None,
            square_a=float(inner[i, i]),
            square_b=float(inner[j, j]),
            inner=float(inner[i, j]),
            square_sum=max(0.0, float(inner[i, i] + inner[j, j] + 2 * inner[i, j])),
        )
        for parts, (i, j) in zip(common, pairs, strict=True)
    ]
