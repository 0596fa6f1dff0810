"""Inner products of the deltas of adapters, exact on any bases, and the order in which modules are shown.

A delta is (alpha/r) B A. Its inner products need no (D, N) matrix: <B_a A_a, B_b A_b> = sum((B_a G) * B_b) with G = A_a A_bᵀ.
Shapes: D outputs, N inputs, R rank of a module.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lori.adapter import Adapter
from lori.basis import Basis
from lori.module_names import last, layer, natural


def inner_products(adapters: Sequence[Adapter], module: str) -> NDArray[np.float64]:
    """Returns <ΔW_i, ΔW_j> (n, n) fp64 in one module, zero for an adapter without it.

    Each basis draws A once, at its largest rank. The adapters must be of one base model.
    """
    members: defaultdict[Basis, list[int]] = defaultdict(list)
    for i, adapter in enumerate(adapters):
        if module in adapter.modules:
            members[adapter.basis].append(i)
    factors = {basis: _factors([adapters[i] for i in group], module) for basis, group in members.items()}
    out = np.zeros((len(adapters), len(adapters)))
    for basis_i, (b_i, a_i) in factors.items():
        for basis_j, (b_j, a_j) in factors.items():
            products = (b_i @ (a_i @ a_j.T)).flatten(1) @ b_j.flatten(1).T
            out[np.ix_(members[basis_i], members[basis_j])] = products.numpy()
    out = (out + out.T) / 2
    np.fill_diagonal(out, out.diagonal().clip(0.0))  # a product that cancels may round below zero
    return out


def module_order(adapters: Iterable[Adapter]) -> list[str]:
    """Returns every module that one of `adapters` changes: by layer, then in the order of `target_modules`.

    An adapter read from a file has no order of its own.
    """
    adapters = list(adapters)
    targets = dict.fromkeys(target for adapter in adapters for target in adapter.config.target_modules)
    places = {target: i for i, target in enumerate(targets)}

    def key(module: str) -> tuple[object, ...]:
        place = places.get(module, places.get(last(module), len(places)))
        return natural(layer(module)), place, natural(module)

    return sorted({module for adapter in adapters for module in adapter.modules}, key=key)


def _factors(adapters: Sequence[Adapter], module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (alpha/r) B (n, D, R) and the A (R, N) of adapters on one basis, fp64; a smaller rank has columns of zeros."""
    scaled = [adapter.config.scale_of(module) * adapter.modules[module].dense(torch.float64) for adapter in adapters]
    rank = max(b.shape[1] for b in scaled)
    padded = [torch.nn.functional.pad(b, (0, rank - b.shape[1])) for b in scaled]
    return torch.stack(padded), adapters[0].basis.draw(module, rank, adapters[0].shape_of(module)[1]).double()
