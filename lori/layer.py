"""The linear layers of a served base: W with the rows of every basis's A below it, `[y; s] = [W; A] x`, then the step's deltas.

Layers that read one input share one product: `[y_q; y_k; y_v; s_q; s_k; s_v] = [W_q; W_k; W_v; A_q; A_k; A_v] x`.
Shapes: T tokens, N inputs, D outputs, A bases, R rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lori.basis import Basis
from lori.kernels import Operands, Route, add_delta
from lori.module_names import last

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers of one block that models call on one tensor. Where a model does not, each call takes the product of all."""


class ActiveRoute:
    """Holds the route of the step that is running; every layer of a model reads the same one."""

    def __init__(self) -> None:
        self.route: Route | None = None


class SharedProduct:
    """The product of frozen linear layers that read one input, the rows of A of each after all of W.

    The first layer that is called computes it for all; those that follow on the same tensor in the same step take their part,
    each once. So no model may change the tensor between them. Holds nothing of a step once all have; where a model leaves one
    out, the last step's parts. For one thread.
    """

    def __init__(self, linears: Sequence[nn.Linear], blocks: Sequence[Sequence[torch.Tensor]]) -> None:
        outputs = [linear.out_features for linear in linears]
        reduced = [sum(len(a) for a in of_layer) for of_layer in blocks]
        rows = [a.to(linears[0].weight.detach()) for of_layer in blocks for a in of_layer]
        self.weight = torch.cat([*(linear.weight.detach() for linear in linears), *rows])  # (sum of D + sum of A R, N)
        biases = [None if linear.bias is None else linear.bias.detach() for linear in linears]
        bias = None if all(b is None for b in biases) else self._bias(outputs, biases)
        self._base = _Product(self.weight[: sum(outputs)], None if bias is None else bias[: sum(outputs)], outputs)
        self._whole = _Product(self.weight, bias, outputs + reduced)
        self._layers = frozenset(range(len(linears)))
        self._waiting: set[int] = set()
        self._x: torch.Tensor | None = None
        self._route: Route | None = None
        self._parts: tuple[torch.Tensor, ...] = ()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_x": None, "_route": None, "_parts": (), "_waiting": set()}

    def take(self, layer: int, x: torch.Tensor, route: Route | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns y (T, D) and, with a route, s (T, A R) of a layer for x (…, N); the layer may change them."""
        parts = self._parts
        if not (self._x is x and self._route is route and layer in self._waiting):
            self._parts = parts = (self._base if route is None else self._whole).of(x)
            self._x, self._route, self._waiting = x, route, set(self._layers)
        y, s = parts[layer], None if route is None else parts[len(self._layers) + layer]
        self._waiting.discard(layer)
        if not self._waiting:
            self._x, self._route, self._parts = None, None, ()
        return y, s

    def _bias(self, outputs: Sequence[int], biases: Sequence[torch.Tensor | None]) -> torch.Tensor:
        # 0 where a layer has none, and for s.
        bias = self.weight.new_zeros(len(self.weight))
        for part, own in zip(bias.split_with_sizes([*outputs, len(bias) - sum(outputs)]), biases, strict=False):
            if own is not None:
                part.copy_(own)
        return bias


@dataclass(frozen=True, slots=True)
class _Product:
    weight: torch.Tensor
    bias: torch.Tensor | None
    sizes: list[int]

    def of(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return F.linear(x.flatten(0, -2), self.weight, self.bias).split_with_sizes(self.sizes, 1)


class LoriLinear(nn.Module):
    """A frozen linear layer that adds the deltas of the active route: one of those of a shared product."""

    def __init__(self, product: SharedProduct, layer: int, operands: Operands, active: ActiveRoute) -> None:
        super().__init__()
        self.product, self.layer, self.operands, self.active = product, layer, operands, active

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (…, N) to (…, D)."""
        route = self.active.route
        y, s = self.product.take(self.layer, x, route)
        if route is not None:
            assert s is not None
            rank = self.operands.layout.rank
            add_delta(y, s.view(y.shape[0], s.shape[1] // rank, rank), self.operands, route)
        return y.view(*x.shape[:-1], y.shape[1])


def fuse(
    linears: Sequence[nn.Linear], blocks: Sequence[Sequence[torch.Tensor]], operands: Sequence[Operands], active: ActiveRoute
) -> list[LoriLinear]:
    """Returns the layers that stand for `linears`, which read one input; `blocks` are the A (R, N) of each basis, by layer."""
    product = SharedProduct(linears, blocks)
    return [LoriLinear(product, layer, of, active) for layer, of in enumerate(operands)]


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
    operands: dict[str, Operands] = {}
    for names in _groups(model, targets):
        owner = model.get_submodule(names[0].rpartition(".")[0])
        linears = [getattr(owner, last(name)) for name in names]
        for name, linear in zip(names, linears, strict=True):
            operands[name] = Operands(num_slots, rank, targets[name][0], linear.weight.dtype, linear.weight.device)
        blocks = [[basis.draw(name, rank, targets[name][1]) for basis in bases] for name in names]
        for name, layer in zip(names, fuse(linears, blocks, [operands[name] for name in names], active), strict=True):
            setattr(owner, last(name), layer)
    return operands


def _groups(model: nn.Module, targets: Mapping[str, tuple[int, int]]) -> list[list[str]]:
    # Those that share an input and are of one kind together, all others alone.
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, (_, num_inputs) in targets.items():
        owner, _, child = name.rpartition(".")
        weight = model.get_parameter(f"{name}.weight")
        shared = next((names for names in SHARED_INPUTS if child in names), (child,))
        groups.setdefault((owner, shared, num_inputs, weight.dtype, weight.device), []).append(name)
    return list(groups.values())
