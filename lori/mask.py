"""Masks of B: the largest entries, ranked over all modules together or within groups (arXiv 2504.07448, section 3.2).

Shapes: D outputs of a module, R rank.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Literal, get_args

import torch

from lori.errors import MaskError
from lori.identity import layer_of, projection_of, submodule_of

Granularity = Literal["model", "module", "layer", "projection", "matrix"]
"""Group of entries that are ranked together: all entries; attention or MLP; one layer; one kind of projection; one B."""
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)

AVOIDED = -1.0
"""Stand-in for the magnitude of an avoided entry: lower than any magnitude."""


def mask_nnz(num_entries: int, sparsity: float) -> int:
    """Return the number of entries that a mask over `num_entries` keeps at `sparsity` (0 keeps all, 0.9 a tenth); at least 1."""
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity is {sparsity}, expected 0 <= sparsity < 1")
    return max(1, round(num_entries * (1.0 - sparsity)))


def group_of(module: str, granularity: Granularity) -> str:
    """Return the group in which the entries of `module` (a full name) are ranked.

    The five granularities are the paper's (appendix on masks; `extract_mask.py` of its code). Its granularity "module" means
    attention or MLP, over all layers.
    """
    groups = {
        "model": "",
        "module": submodule_of(module),
        "layer": layer_of(module),
        "projection": projection_of(module),
        "matrix": module,
    }
    return groups[granularity]


def top_k_mask(
    deltas: Mapping[str, torch.Tensor],
    sparsity: float,
    granularity: Granularity = "model",
    avoided: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Return a bool mask (D, R) for each B (D, R). A mask keeps the largest |B| of its group, and no entry that is avoided.

    `avoided` holds a bool (D, R) for each B. Each group keeps exactly `mask_nnz` entries. Of equal magnitudes the first in
    module order, then row-major order, wins. Raises `MaskError` if a group has too few entries that are not avoided.
    """
    groups = defaultdict(list)
    for module in deltas:
        groups[group_of(module, granularity)].append(module)
    masks: dict[str, torch.Tensor] = {}
    for modules in groups.values():
        magnitudes = torch.cat([deltas[module].detach().abs().flatten().float() for module in modules])
        if avoided is not None:
            magnitudes[torch.cat([avoided[module].flatten() for module in modules])] = AVOIDED
        masks |= _top_k(magnitudes, {module: deltas[module] for module in modules}, sparsity)
    return {module: masks[module] for module in deltas}


def _top_k(flat: torch.Tensor, deltas: Mapping[str, torch.Tensor], sparsity: float) -> dict[str, torch.Tensor]:
    count = mask_nnz(flat.numel(), sparsity)
    if (num_free := int((flat != AVOIDED).sum())) < count:
        raise MaskError(
            f"a mask of {count} entries is asked for, and only {num_free} of {flat.numel()} are not avoided, "
            f"in {next(iter(deltas))} and the {len(deltas) - 1} modules ranked with it: raise sparsity or avoid fewer adapters"
        )
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[largest(flat, count)] = True
    parts = mask.split([b.numel() for b in deltas.values()])
    return {name: part.view(b.shape) for (name, b), part in zip(deltas.items(), parts, strict=True)}


def largest(magnitudes: torch.Tensor, count: int) -> torch.Tensor:
    """Return the positions (count,) of the largest of `magnitudes` (n,). Of equal magnitudes the first wins."""
    return torch.sort(magnitudes, descending=True, stable=True).indices[:count]
