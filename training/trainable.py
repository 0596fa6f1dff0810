"""The trainable delta of LoRI on a frozen linear layer: y = W x + (alpha / r) B (A x), arXiv 2504.07448, section 3.

LoRI-D trains all of B. LoRI-S trains only the entries of a mask. Only those entries exist as parameters, so there are gradients
and optimizer state for no other entries.

Shapes: T tokens, N inputs, D outputs, R rank, K entries of the mask.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lori.base_identity import module_shapes
from lori.basis import Basis
from lori.errors import ModelError
from lori.sparse import SparseB


class SparseEntries(nn.Module):
    """Entries of a B (D, R): their positions in the flattened B, and their values."""

    positions: torch.Tensor

    def __init__(self, indices: torch.Tensor, values: torch.Tensor, *, is_trained: bool) -> None:
        super().__init__()
        self.register_buffer("positions", indices.int(), persistent=False)  # (K,)
        self.values = nn.Parameter(values.float(), requires_grad=is_trained)

    def added_to(self, flat: torch.Tensor, scale: float) -> torch.Tensor:
        """Return a copy of `flat` (D R,) with scale times the values added at their positions."""
        return flat.index_add(0, self.positions, (scale * self.values).to(flat.dtype))


class DenseB(nn.Module):
    """B of LoRI-D: a trained change of every entry of B (D, R), added to the B it starts from.

    The mask keeps the entries with the largest changes.
    """

    def __init__(self, num_outputs: int, rank: int, start: SparseB | None = None) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros(num_outputs, rank))
        self.start = SparseEntries(start.indices, start.values, is_trained=False) if start else None

    def scaled(self, scale: float, dtype: torch.dtype) -> torch.Tensor:
        """Return scale * B, (D, R) of `dtype`."""
        flat = (scale * self.change).to(dtype).flatten()
        flat = self.start.added_to(flat, scale) if self.start else flat
        return flat.view(self.change.shape)

    def sparse(self) -> SparseB:
        """Return B for an adapter, with a mask of all entries."""
        dense = values_of(self.change)
        flat = self.start.added_to(dense.flatten(), 1.0) if self.start else dense
        return SparseB.from_dense(flat.view(dense.shape), torch.ones_like(dense, dtype=torch.bool))


class MaskedB(nn.Module):
    """B of LoRI-S: the entries of B (D, R) where `mask` is true are trained, from `start` or zero.

    The entries of `start` outside of the mask stay unchanged.
    """

    def __init__(self, mask: torch.Tensor, start: SparseB | None = None) -> None:
        super().__init__()
        self.shape = mask.shape
        indices = mask.flatten().nonzero().squeeze(1)
        dense = start.dense() if start else torch.zeros(mask.shape)
        self.trained = SparseEntries(indices, dense.flatten()[indices], is_trained=True)
        outside = SparseB.from_dense(dense, start.mask & ~mask) if start else None
        self.outside = SparseEntries(outside.indices, outside.values, is_trained=False) if outside else None

    def scaled(self, scale: float, dtype: torch.dtype) -> torch.Tensor:
        """Return scale * B, (D, R) of `dtype`."""
        flat = torch.zeros(self.shape.numel(), dtype=dtype, device=self.trained.values.device)
        for entries in (self.trained, self.outside):
            flat = entries.added_to(flat, scale) if entries else flat
        return flat.view(self.shape)

    def sparse(self) -> SparseB:
        """Return B for an adapter: the trained entries in the mask, and outside of it the unchanged entries of `start`."""
        mask, dense = torch.zeros(self.shape, dtype=torch.bool), torch.zeros(self.shape)
        for entries in (self.trained, self.outside):
            if entries:
                positions = entries.positions.cpu().long()
                mask.view(-1)[positions], dense.view(-1)[positions] = True, values_of(entries.values)
        return SparseB.from_dense(dense, mask)


def values_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a parameter's values on the CPU, without gradient."""
    return tensor.detach().cpu().clone()


class TrainableLinear(nn.Module):
    """A frozen linear layer with a trainable delta. A's rows are appended to W's, so that W x and A x are one matrix product.

    If W is sharded over processes, A is a parameter of its own, and A x a product of its own.
    """

    def __init__(self, linear: nn.Linear, a: torch.Tensor, scale: float, start: SparseB | None = None) -> None:
        super().__init__()
        self.num_outputs, self.scale, self.linear = linear.out_features, scale, linear
        self.adapter_weight = 1.0  # at 0 the layer computes as the base's layer
        self.a: nn.Parameter | None = None
        a = a.to(linear.weight.device, linear.weight.dtype)
        if isinstance(linear.weight, DTensor):
            self.a = nn.Parameter(a, requires_grad=False)
        else:
            linear.weight = nn.Parameter(torch.cat([linear.weight.detach(), a]), requires_grad=False)  # (D + R, N)
        self.b: DenseB | MaskedB
        self.set_b(DenseB(linear.out_features, a.shape[0], start))

    def set_b(self, b: DenseB | MaskedB) -> None:
        """Replace B by `b`, moved to the device of W."""
        self.b = b.to(self.linear.weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output (…, D) for the input `x` (…, N)."""
        weight, bias = self.linear.weight, self.linear.bias
        if not self.adapter_weight:
            return F.linear(x, weight[: self.num_outputs], bias)
        tokens = x.flatten(0, -2)
        y = F.linear(tokens, weight)
        if self.a is None:
            y, s = y.split([self.num_outputs, y.shape[-1] - self.num_outputs], dim=-1)  # (T, D), (T, R)
            s = s.clone()  # autograd saves s for the backward pass; as a view it would keep the whole product alive
        else:
            s = F.linear(tokens, self.a)
        out = torch.addmm(y, s, self.b.scaled(self.adapter_weight * self.scale, s.dtype).T)
        return (out if bias is None else out + bias).view(*x.shape[:-1], self.num_outputs)


@contextmanager
def at_adapter_weight(model: nn.Module, weight: float) -> Iterator[None]:
    """Context manager: the deltas of `model` have this weight, as in a merge. Restores their previous weights afterwards."""
    layers = [module for module in model.modules() if isinstance(module, TrainableLinear)]
    weights = [layer.adapter_weight for layer in layers]
    for layer in layers:
        layer.adapter_weight = weight
    try:
        yield
    finally:
        for layer, previous in zip(layers, weights, strict=True):
            layer.adapter_weight = previous


def adapter_disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Context manager: the wrapped layers of `model` compute as the base's layers, without the deltas."""
    return at_adapter_weight(model, 0.0)


def target_layers(model: PreTrainedModel, targets: Iterable[str]) -> dict[str, nn.Linear]:
    """Return the linear layers of `model` whose last name part is one of `targets`, by full name, in model order.

    Raises `ModelError` with each target that the model does not have.
    """
    targets = list(targets)
    names = [name for name in module_shapes(model) if name.rpartition(".")[2] in targets]
    if missing := [t for t in targets if not any(name.rpartition(".")[2] == t for name in names)]:
        raise ModelError(f"target_modules names {missing}, and no linear layer of the model that can be adapted is called so")
    layers = {}
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layers[name] = linear
    return layers


def wrap(
    model: PreTrainedModel,
    targets: Iterable[str],
    basis: Basis,
    rank: int,
    alpha: float,
    start: Mapping[str, SparseB] | None = None,
) -> dict[str, TrainableLinear]:
    """Replace each of `target_layers` by a trainable layer, with B from `start` or zero. Returns the new layers by full name."""
    wrapped = {}
    for name, linear in target_layers(model, targets).items():
        a = basis.draw(name, rank, linear.in_features)
        wrapped[name] = TrainableLinear(linear, a, alpha / rank, start[name] if start else None)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, wrapped[name])
    return wrapped
