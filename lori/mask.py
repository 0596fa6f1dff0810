"""Which entries of B an adapter may use: the largest, over all modules together or within groups (arXiv 2504.07448, section 3.2).

Shapes: D outputs of a module, R rank.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Literal, get_args

import torch

from lori.module_names import block, last, layer

Granularity = Literal["model", "module", "layer", "projection", "matrix"]
"""What is ranked together: everything; attention and MLP apart; each layer; each kind of projection; each B."""
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)


def num_kept(num_entries: int, sparsity: float) -> int:
    """Returns how many of `num_entries` survive at `sparsity` (0 keeps all, 0.9 keeps a tenth); at least one."""
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity is {sparsity}, expected 0 <= sparsity < 1")
    return max(1, round(num_entries * (1.0 - sparsity)))


def group_of(module: str, granularity: Granularity) -> str:
    """Returns the group in which the entries of `module`, its full name, are ranked.

    The five granularities are the paper's (appendix on masks; `extract_mask.py` of its code). A module is attention or MLP, over
    all layers.
    """
    parts = {"model": "", "module": block(module), "layer": layer(module), "projection": last(module), "matrix": module}
    return parts[granularity]


def top_k_mask(
    deltas: Mapping[str, torch.Tensor], sparsity: float, granularity: Granularity = "model"
) -> dict[str, torch.Tensor]:
    """Returns a bool mask (D, R) for each B (D, R) that keeps the largest |B| of each group.

    Exactly `num_kept` entries of a group survive: ties are broken by position (module order, then row-major), the first win.
    """
    groups = defaultdict(list)
    for module in deltas:
        groups[group_of(module, granularity)].append(module)
    masks: dict[str, torch.Tensor] = {}
    for modules in groups.values():
        masks |= _top_k({module: deltas[module] for module in modules}, sparsity)
    return {module: masks[module] for module in deltas}


def _top_k(deltas: Mapping[str, torch.Tensor], sparsity: float) -> dict[str, torch.Tensor]:
    flat = torch.cat([b.detach().abs().flatten().float() for b in deltas.values()])
    keep = torch.zeros_like(flat, dtype=torch.bool)
    keep[largest(flat, num_kept(flat.numel(), sparsity))] = True
    parts = keep.split([b.numel() for b in deltas.values()])
    return {name: part.view(b.shape) for (name, b), part in zip(deltas.items(), parts, strict=True)}


def largest(magnitudes: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the positions (count,) of the largest of `magnitudes` (n,), the first ones where some are equal."""
    return torch.sort(magnitudes, descending=True, stable=True).indices[:count]
