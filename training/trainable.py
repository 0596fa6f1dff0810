"""The trainable delta of LoRI on a frozen linear layer: y = W x + (alpha / r) B (A x), arXiv 2504.07448, section 3.

LoRI-D trains all of B. LoRI-S trains only the entries that a mask keeps: they alone exist as parameters.
Shapes: T tokens, N inputs, D outputs, R rank, K kept entries.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lori.basis import Basis
from lori.errors import ModelError
from lori.layer import module_shapes
from lori.sparse import SparseB


class DenseDelta(nn.Module):
    """LoRI-D: every entry of B (D, R), from zero."""

    def __init__(self, num_outputs: int, rank: int) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(num_outputs, rank))

    def dense(self) -> torch.Tensor:
        """Returns B, (D, R) fp32."""
        return self.b


class MaskedDelta(nn.Module):
    """LoRI-S: the entries of B (D, R) where `mask` is true, from zero."""

    positions: torch.Tensor

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.shape = mask.shape
        self.register_buffer("positions", mask.flatten().nonzero().squeeze(1))  # (K,)
        self.values = nn.Parameter(torch.zeros(self.positions.shape))

    def dense(self) -> torch.Tensor:
        """Returns B, (D, R) fp32, zero where the mask is false."""
        flat = torch.zeros(self.shape.numel(), device=self.values.device)
        return flat.index_put((self.positions,), self.values).view(self.shape)

    def sparse(self) -> SparseB:
        """Returns B as an adapter holds it."""
        return SparseB((self.shape[0], self.shape[1]), self.positions.cpu().int(), self.values.detach().cpu().clone())


class TrainableLinear(nn.Module):
    """A frozen linear layer with A's rows below W's, so that W x and A x are one product, and a trainable delta."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear, a: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.num_outputs, self.scale = linear.out_features, scale
        self.register_buffer("weight", torch.cat([linear.weight.detach(), a.to(linear.weight)]))  # (D + R, N)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.delta: DenseDelta | MaskedDelta = DenseDelta(linear.out_features, a.shape[0])
        self.is_active = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (…, N) to (…, D)."""
        if not self.is_active:
            return F.linear(x, self.weight[: self.num_outputs], self.bias)
        both = F.linear(x, self.weight)
        y, s = both.split([self.num_outputs, both.shape[-1] - self.num_outputs], dim=-1)
        if self.bias is not None:
            y = y + self.bias
        out: torch.Tensor = y + F.linear(s, self.scale * self.delta.dense().to(s.dtype))
        return out


@contextmanager
def base_alone(model: nn.Module) -> Iterator[None]:
    """Inside, the wrapped layers of `model` give what the base's own gave."""
    layers = [module for module in model.modules() if isinstance(module, TrainableLinear)]
    for layer in layers:
        layer.is_active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.is_active = True


def wrap(model: PreTrainedModel, targets: Iterable[str], basis: Basis, rank: int, alpha: float) -> dict[str, TrainableLinear]:
    """Replaces every linear layer of `model` whose name ends in one of `targets`; returns them by full name, in model order.

    Raises `ModelError` naming each target that is not there.
    """
    targets = list(targets)
    names = [name for name in module_shapes(model) if name.rpartition(".")[2] in targets]
    if missing := [t for t in targets if not any(name.rpartition(".")[2] == t for name in names)]:
        raise ModelError(f"target_modules names {missing}, and no linear layer of the model that can be adapted is called so")
    wrapped = {}
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        wrapped[name] = TrainableLinear(linear, basis.draw(name, rank, linear.in_features), alpha / rank)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, wrapped[name])
    return wrapped
