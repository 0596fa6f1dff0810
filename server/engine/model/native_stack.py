"""A decoder's layers in one call of the compiled module, where all that they do is in it: in bf16 on a CPU."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lori.kernels import Route
from lori.kernels.cpu import bound_operands, bound_route
from lori.kernels.native import MODULE
from lori.projection import NativeProjection
from server.engine.model.decoder import Layer, Norm, Turns
from server.engine.model.native_ops import ACTIVATIONS, NativeOps

NUM_PRODUCTS = 4
"""Of a layer."""


class NativeStack(NativeOps):
    """Operations for `layers`, all of whose products are native. `run` takes those alone."""

    def __init__(self, layers: Sequence[Layer], num_blocks: int, block_size: int, dtype: torch.dtype) -> None:
        super().__init__([layer.heads for layer in layers], num_blocks, block_size, dtype)
        module: Any = MODULE
        self._turns = sorted({layer.turn for layer in layers})
        bound = [self._layer(layer, number, module) for number, layer in enumerate(layers)]
        self._stack = module.Stack(self._layers, bound, self._num_blocks)
        self._products = [product for layer in layers for product in products(layer)]
        self._operands = [of for product in self._products for of in product.operands]

    def run(
        self, layers: Sequence[Layer], stream: torch.Tensor, turns: Mapping[str, Turns], step: object, route: Route | None
    ) -> torch.Tensor:
        """See `Ops`."""
        if route is not None and any(product.has_dense(route) for product in self._products):
            return super().run(layers, stream, turns, step, route)
        assert stream.dtype is torch.bfloat16
        assert stream.is_contiguous()
        added = torch.empty_like(stream)
        operands = [] if route is None else [bound_operands(of) for of in self._operands]
        at = [tuple(of.data_ptr() for of in turns[name]) for name in self._turns]
        self._stack.forward(
            stream.data_ptr(), added.data_ptr(), step, at, route and bound_route(route), operands, torch.get_num_threads()
        )
        return added

    def _layer(self, layer: Layer, number: int, module: Any) -> Any:
        qkv, output, gate_up, down = (product.bound for product in products(layer))
        return module.Layer(
            layer.attention_norm.weight.numpy(), qkv, self._heads[number], self._turns.index(layer.turn), output,
            _weight(layer.attention_output_norm), layer.mlp_norm.weight.numpy(), gate_up, ACTIVATIONS.index(layer.activation),
            down, _weight(layer.mlp_output_norm), layer.mlp_norm.epsilon, self._memory[number].data_ptr(),
        )  # fmt: skip


def products(layer: Layer) -> list[NativeProjection]:
    """Returns the products of a layer in their order, those that are native."""
    return [of for of in (layer.qkv, layer.output, layer.gate_up, layer.down) if isinstance(of, NativeProjection)]


def _weight(norm: Norm | None) -> Any:
    return None if norm is None else norm.weight.numpy()
