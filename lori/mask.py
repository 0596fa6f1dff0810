"""Which entries of B an adapter may use: the largest, over all modules together or within groups (arXiv 2504.07448, section 3.2).

Shapes: D outputs of a module, R rank.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Literal, get_args

import torch

from lori.errors import MaskError
from lori.identity import block, last, layer

Granularity = Literal["model", "module", "layer", "projection", "matrix"]
"""What is ranked together: everything; attention and MLP apart; each layer; each kind of projection; each B."""
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)

AVOIDED = -1.0
"""Ranks below every magnitude."""


def num_kept(num_entries: int, sparsity: float) -> int:
    """Return how many of `num_entries` survive at `sparsity` (0 keeps all, 0.9 keeps a tenth); at least one."""
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity is {sparsity}, expected 0 <= sparsity < 1")
    return max(1, round(num_entries * (1.0 - sparsity)))


def group_of(module: str, granularity: Granularity) -> str:
    """Return the group in which the entries of `module`, its full name, are ranked.

    The five granularities are the paper's (appendix on masks; `extract_mask.py` of its code). A module is attention or MLP, over
    all layers.
    """
    parts = {"model": "", "module": block(module), "layer": layer(module), "projection": last(module), "matrix": module}
    return parts[granularity]


def top_k_mask(
    deltas: Mapping[str, torch.Tensor],
    sparsity: float,
    granularity: Granularity = "model",
    avoided: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Return a bool mask (D, R) for each B (D, R) that keeps the largest |B| of each group, none where `avoided` is true.

    `avoided` has a bool (D, R) for each B. Exactly `num_kept` entries of a group survive: ties are broken by position (module
    order, then row-major), the first win. Raises `MaskError` where a group has fewer that are not avoided.
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
    count = num_kept(flat.numel(), sparsity)
    if (num_free := int((flat != AVOIDED).sum())) < count:
        raise MaskError(
            f"a mask of {count} entries is asked for, and only {num_free} of {flat.numel()} are not avoided, "
            f"in {next(iter(deltas))} and the {len(deltas) - 1} modules ranked with it: raise sparsity or avoid fewer adapters"
        )
    keep = torch.zeros_like(flat, dtype=torch.bool)
    keep[largest(flat, count)] = True
    parts = keep.split([b.numel() for b in deltas.values()])
    return {name: part.view(b.shape) for (name, b), part in zip(deltas.items(), parts, strict=True)}


def largest(magnitudes: torch.Tensor, count: int) -> torch.Tensor:
    """Return the positions (count,) of the largest of `magnitudes` (n,), the first ones where some are equal."""
    return torch.sort(magnitudes, descending=True, stable=True).indices[:count]
