"""Which entries of B an adapter may use: one global top-k over all modules (arXiv 2504.07448, section 3.2).

Shapes: D outputs of a module, R rank.
"""

from collections.abc import Mapping

import torch


def num_kept(num_entries: int, sparsity: float) -> int:
    """Returns how many of `num_entries` survive at `sparsity` (0 keeps all, 0.9 keeps a tenth); at least one."""
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity is {sparsity}, expected 0 <= sparsity < 1")
    return max(1, round(num_entries * (1.0 - sparsity)))


def top_k_mask(deltas: Mapping[str, torch.Tensor], sparsity: float) -> dict[str, torch.Tensor]:
    """Returns a bool mask (D, R) for each B (D, R) that keeps the largest |B| over all modules together.

    Exactly `num_kept` entries survive: ties are broken by position (module order, then row-major), the first ones win.
    """
    flat = torch.cat([b.detach().abs().flatten().float() for b in deltas.values()])
    order = torch.sort(flat, descending=True, stable=True).indices
    keep = torch.zeros_like(flat, dtype=torch.bool)
    keep[order[: num_kept(flat.numel(), sparsity)]] = True
    parts = keep.split([b.numel() for b in deltas.values()])
    return {name: part.view(b.shape) for (name, b), part in zip(deltas.items(), parts, strict=True)}
