"""The linear layer of a served base: W with the rows of every basis's A below it, `[y; s] = [W; A] x`, then the step's deltas.

Shapes: T tokens, N inputs, D outputs, A bases, R rank.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lori.basis import Basis
from lori.kernels import Operands, Route, add_delta


class ActiveRoute:
    """Holds the route of the step that is running; every layer of a model reads the same one."""

    def __init__(self) -> None:
        self.route: Route | None = None


class LoriLinear(nn.Module):
    """A frozen linear layer that adds the deltas of the active route."""

    def __init__(self, linear: nn.Linear, blocks: Sequence[torch.Tensor], operands: Operands, active: ActiveRoute) -> None:
        super().__init__()
        self.num_outputs, self.num_bases = linear.out_features, len(blocks)
        self.weight = torch.cat([linear.weight, *(a.to(linear.weight) for a in blocks)])  # (D + A R, N)
        self.bias = linear.bias
        self.operands, self.active = operands, active

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (…, N) to (…, D)."""
        route = self.active.route
        if route is None:
            return F.linear(x, self.weight[: self.num_outputs], self.bias)
        both = F.linear(x.flatten(0, -2), self.weight)  # (T, D + A R)
        y, s = both[:, : self.num_outputs], both[:, self.num_outputs :]
        if self.bias is not None:
            y += self.bias
        add_delta(y, s.unflatten(1, (self.num_bases, -1)), self.operands, route)
        return y.view(*x.shape[:-1], self.num_outputs)


def module_shapes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Returns (D, N) of every linear layer of `model` that can take a delta, by full name in model order.

    The output embeddings are not among them.
    """
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    }


def attach(
    model: nn.Module,
    targets: Mapping[str, tuple[int, int]],
    bases: Sequence[Basis],
    rank: int,
    num_slots: int,
    active: ActiveRoute,
) -> dict[str, Operands]:
    """Replaces the linear layers that `targets` names, (D, N) each, and returns their empty operands by name.

    Each layer gets `rank` rows of A of every one of `bases`, in their order. The replaced weights are freed.
    """
    operands = {}
    for name, (num_outputs, num_inputs) in targets.items():
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        linear = getattr(owner, child)
        operands[name] = Operands(num_slots, rank, num_outputs, linear.weight.dtype, linear.weight.device)
        blocks = [basis.draw(name, rank, num_inputs) for basis in bases]
        setattr(owner, child, LoriLinear(linear, blocks, operands[name], active))
    return operands
