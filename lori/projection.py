"""Frozen linear layers that share an input, as one matrix product with every basis's A, `[y; s] = [W; A] x`; then the deltas.

`[y_q; y_k; y_v; s_q; s_k; s_v] = [W_q; W_k; W_v; A_q; A_k; A_v] x`. A step without adapters leaves A out. The weights are in the
model's dtype or in 8 bits. 8 bits halve the bytes of bf16, and decoding is bound by reading the weights. Shapes: T tokens, N
inputs, D outputs of a layer, A bases, R rank.
"""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from lori.errors import ModelError
from lori.kernels import Operands, Route, add_delta
from lori.kernels.cpu import bound_operands, bound_route
from lori.kernels.pages import Arena
from lori.native import MODULE, choose

Quantization = Literal["int8"]
INT8_MAX = 127
ARENA = Arena()
"""Memory of the weights of all products. Models of one process share its blocks."""


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `weight` (D, N) as int8 (D, N), rounded to nearest, and a scale (D,) fp32 for each output: weight ~ scale * int8.

    The largest magnitude of each row is 127.
    """
    wide = weight.float()
    scales = wide.abs().amax(1) / INT8_MAX
    return (wide / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round().to(torch.int8), scales


Blocks = Sequence[Sequence[torch.Tensor]]
"""For each layer, the A (R, N) of every basis."""


class Projection(Protocol):
    """Linear layers that share an input. Adapters may be put into and cleared from the operands between steps."""

    def __call__(self, x: torch.Tensor, route: Route | None) -> torch.Tensor:
        """Return y (T, sum of D), contiguous, for x (T, N): W x + bias plus the deltas of the route."""


def project(
    linears: Sequence[nn.Linear],
    blocks: Blocks = (),
    operands: Sequence[Operands] = (),
    quantization: Quantization | None = None,
) -> Projection:
    """Return the projection that replaces `linears`. A projection without operands must not be called with a route.

    Copies the weights. The projection is in C++ if `has_native` holds and the number of inputs is even, else in torch. torch's
    has no quantized weights: raises `ModelError` if `quantization` is given then.
    """
    if _is_native(linears):
        return NativeProjection(linears, blocks, operands, quantization)
    if quantization:
        weight = linears[0].weight
        product = f"{quantization} of {weight.shape[1]} inputs in {weight.dtype} on {weight.device}"
        needs = "a CPU, the compiled module, and an even number of inputs in bfloat16"
        raise ModelError(f"there are no products in {product} here: they need {needs}")
    return TorchProjection(linears, blocks, operands)


def has_native(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether the compiled module computes products of this dtype: bf16 on a CPU."""
    return device.type == "cpu" and dtype is torch.bfloat16 and bool(MODULE)


def _is_native(linears: Sequence[nn.Linear]) -> bool:
    weight = linears[0].weight
    return has_native(weight.dtype, weight.device) and weight.shape[1] % 2 == 0


class TorchProjection:
    """A projection in torch."""

    def __init__(self, linears: Sequence[nn.Linear], blocks: Blocks, operands: Sequence[Operands]) -> None:
        self._outputs = [linear.out_features for linear in linears]
        self._reduced = [sum(len(a) for a in layer) for layer in blocks]
        self._operands = operands
        weight = linears[0].weight.detach()
        rows = [a.to(weight) for layer in blocks for a in layer]
        self._weight = torch.cat([*(linear.weight.detach() for linear in linears), *rows])  # (sum of D + sum of A R, N)
        bias = joint_bias(linears)
        self._bias = None if bias is None else F.pad(bias, (0, sum(self._reduced)))
        self._num_outputs = sum(self._outputs)

    def __call__(self, x: torch.Tensor, route: Route | None) -> torch.Tensor:
        """See `Projection`."""
        if route is None:
            bias = None if self._bias is None else self._bias[: self._num_outputs]
            return F.linear(x, self._weight[: self._num_outputs], bias)
        if len(self._operands) != len(self._outputs):
            raise ValueError("the route has terms, and these layers have no operands")
        joint = F.linear(x, self._weight, self._bias)  # (T, sum of D + sum of A R)
        parts = joint.split_with_sizes([*self._outputs, *self._reduced], 1)
        for y, s, operands in zip(parts, parts[len(self._outputs) :], self._operands, strict=False):
            rank = operands.layout.rank
            add_delta(y, s.view(len(x), s.shape[1] // rank, rank), operands, route)
        return joint[:, : self._num_outputs].contiguous()


class NativeProjection:
    """A projection in C++, bf16. The weights are packed in panels; the adapters' bytes are prefetched during the product.

    `quantization` applies to the weights, not to the rows of A. `bound` is the C++ object; `operands` are those of the layers.
    `instruction_set` is by default the fastest that this process may use.
    """

    def __init__(
        self,
        linears: Sequence[nn.Linear],
        blocks: Blocks,
        operands: Sequence[Operands],
        quantization: Quantization | None = None,
        instruction_set: str | None = None,
    ) -> None:
        self._outputs = [linear.out_features for linear in linears]
        self._reduced = [sum(len(a) for a in layer) for layer in blocks]
        self.operands = operands
        self._num_outputs, self._num_reduced = sum(self._outputs), sum(self._reduced)
        num_inputs = self._num_inputs = linears[0].in_features
        weights = [linear.weight.detach() for linear in linears]
        # The A of all layers are packed together, since a panel of a few rows takes as long as a full one.
        rows = [torch.cat([a.to(weights[0]) for layer in blocks for a in layer])] if blocks else []
        int8_panels, scales = None, None
        if quantization:
            quantized, layer_scales = zip(*map(quantize, weights), strict=True)
            int8_panels, scales, weights = _panels(quantized, torch.int8).numpy(), torch.cat(layer_scales).numpy(), []
        panels = _panels([weight.view(torch.uint16) for weight in [*weights, *rows]], torch.uint16)
        bias = joint_bias(linears)
        self.bound = MODULE.Projection(
            panels.numpy(),
            self._outputs,
            self._reduced,
            num_inputs,
            None if bias is None else bias.float().numpy(),
            int8_panels,
            scales,
            choose(instruction_set),
        )

    def __call__(self, x: torch.Tensor, route: Route | None) -> torch.Tensor:
        """See `Projection`."""
        if x.dtype is not torch.bfloat16 or x.shape[1] != self._num_inputs or x.stride(1) != 1:
            raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, expected rows of {self._num_inputs} in bfloat16")
        num_tokens, threads = len(x), torch.get_num_threads()
        y = torch.empty(num_tokens, self._num_outputs, dtype=torch.bfloat16)
        if route is None:
            self.bound.multiply(x.data_ptr(), x.stride(0), num_tokens, y.data_ptr(), self._num_outputs, threads)
            return y
        s = torch.empty(num_tokens, self._num_reduced, dtype=torch.bfloat16)
        self.bound.project(
            x.data_ptr(), x.stride(0), num_tokens, y.data_ptr(), self._num_outputs, s.data_ptr(), self._num_reduced,
            [bound_operands(operands) for operands in self.operands], bound_route(route), threads,
        )  # fmt: skip
        return y


def _panels(weights: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return `weights` (D, N) packed in panels for the compiled module, one after the other."""
    sizes = [MODULE.part_size(*weight.shape) for weight in weights]
    panels = ARENA.zeros(dtype.itemsize * sum(sizes)).view(dtype)
    for weight, part in zip(weights, panels.split(sizes), strict=True):
        MODULE.pack_weights(weight.contiguous().numpy(), part.numpy())
    return panels


def joint_bias(linears: Sequence[nn.Linear]) -> torch.Tensor | None:
    """Return the concatenated biases of the layers, zeros for a layer without bias; `None` if no layer has one."""
    if all(linear.bias is None for linear in linears):
        return None
    weight = linears[0].weight
    return torch.cat([weight.new_zeros(li.out_features) if li.bias is None else li.bias.detach() for li in linears])
