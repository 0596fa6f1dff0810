"""Norms, gates, attention and whole layers in C++, and the layout of keys and values (`lori/kernels/native/layers.h`).

Shapes: T tokens, H heads, G key-value heads, E head size, S spans.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from lori.kernels.cpu import bound_operands, bound_route
from lori.kernels.pages import zeros
from lori.native import MODULE, choose
from lori.projection import NativeProjection
from server.engine.model.decoder import ForwardContext, Heads, Layer, Norm, Rotary, Span, run_layers

if TYPE_CHECKING:
    import _lori_cpu

BLOCK_TOKENS = 16
"""Tokens of a block of native memory. A block of the engine is one or more of these."""
LANES, MAX_HEAD = 16, 512
"""Widths must be multiples of `LANES`, and heads no larger than `MAX_HEAD`."""
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


class NativeOps:
    """Operations on a CPU, in bf16 or fp32."""

    def __init__(self, heads: Sequence[Heads], num_blocks: int, block_size: int, dtype: torch.dtype) -> None:
        assert block_size % BLOCK_TOKENS == 0
        self._native_per_block = block_size // BLOCK_TOKENS
        self._num_blocks = num_blocks * self._native_per_block
        self._dtype = dtype
        self._layers = MODULE.Layers(choose(), str(dtype).removeprefix("torch."))
        self._heads = [_bind_heads(layer_heads) for layer_heads in heads]
        sizes = [self._layers.block_bytes(layer_heads) * self._num_blocks for layer_heads in self._heads]
        self._shape = (heads[0].num_heads, heads[0].num_kv_heads)
        self._memory = zeros(sum(sizes)).split(sizes)  # one allocation, so that a lack of memory shows before any of it is used
        self.num_bytes = sum(sizes)

    def plan(self, spans: Sequence[Span]) -> object:
        """Return the step of `spans`, for `attend`."""
        rows: list[tuple[int, int, int, int]] = []
        table: list[int] = []
        for span in spans:
            rows.append((span.row, span.num_tokens, span.position, len(table)))
            if self._native_per_block == 1:
                table += span.blocks
            else:
                table += [block * self._native_per_block + i for block in span.blocks for i in range(self._native_per_block)]
        return MODULE.Spans(
            torch.tensor(rows, dtype=torch.int32).numpy(), torch.tensor(table, dtype=torch.int32).numpy(), *self._shape
        )

    def norm(self, stream: torch.Tensor, added: torch.Tensor | None, norm: Norm) -> torch.Tensor:
        """See `Ops`."""
        assert stream.dtype is self._dtype
        assert stream.is_contiguous()
        assert added is None or (added.shape == stream.shape and added.is_contiguous())
        out = torch.empty_like(stream)
        num_rows, size = stream.shape
        added_pointer = 0 if added is None else added.data_ptr()
        self._layers.norm(
            stream.data_ptr(), size, added_pointer, size, out.data_ptr(), size, num_rows, norm.weight.numpy(), norm.epsilon,
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    def gate(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """See `Ops`."""
        assert x.dtype is self._dtype
        assert x.is_contiguous()
        num_rows, both = x.shape
        out = torch.empty(num_rows, both // 2, dtype=x.dtype)
        self._layers.gate(
            x.data_ptr(), both, out.data_ptr(), both // 2, num_rows, both // 2, ACTIVATIONS.index(activation),
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    def attend(self, qkv: torch.Tensor, layer: int, heads: Heads, rotary: Rotary, step: object) -> torch.Tensor:
        """See `Ops`."""
        assert isinstance(step, MODULE.Spans)
        assert qkv.dtype is self._dtype
        assert qkv.is_contiguous()
        size = heads.num_heads * heads.head_size
        out = torch.empty(len(qkv), size, dtype=qkv.dtype)
        self._layers.attend(
            self._heads[layer], step, qkv.data_ptr(), qkv.shape[1], out.data_ptr(), size, rotary[0].data_ptr(),
            rotary[1].data_ptr(), self._memory[layer].data_ptr(), self._num_blocks, torch.get_num_threads(),
        )  # fmt: skip
        return out

    def run(self, layers: Sequence[Layer], stream: torch.Tensor, context: ForwardContext) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Ops`."""
        return run_layers(self, layers, stream, context)


def _bind_heads(heads: Heads) -> "_lori_cpu.Heads":
    norms = (heads.query_norm, heads.key_norm)
    epsilon = next((norm.epsilon for norm in norms if norm is not None), 0.0)
    return MODULE.Heads(
        heads.num_heads, heads.num_kv_heads, heads.head_size, heads.scale, heads.window, heads.softcap, epsilon,
        *(None if norm is None else norm.weight.numpy() for norm in norms),
    )  # fmt: skip


NUM_PRODUCTS = 4
"""Number of products of a layer."""


class NativeStack(NativeOps):
    """Operations for `layers` whose products are all native. `run` accepts only these layers."""

    def __init__(self, layers: Sequence[Layer], num_blocks: int, block_size: int, dtype: torch.dtype) -> None:
        super().__init__([layer.heads for layer in layers], num_blocks, block_size, dtype)
        self._rope_names = sorted({layer.rope for layer in layers})
        bound = [self._bind_layer(layer, number) for number, layer in enumerate(layers)]
        self._stack, self._num_layers = MODULE.Stack(self._layers, bound, self._num_blocks), len(layers)
        self._operands = [operands for layer in layers for product in products(layer) for operands in product.operands]

    def run(self, layers: Sequence[Layer], stream: torch.Tensor, context: ForwardContext) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Ops`."""
        assert len(layers) == self._num_layers
        assert isinstance(context.step, MODULE.Spans)
        assert stream.dtype is torch.bfloat16
        assert stream.is_contiguous()
        added = torch.empty_like(stream)
        operands = [] if context.route is None else [bound_operands(o) for o in self._operands]
        tables = [context.rotary[name] for name in self._rope_names]
        pointers = [(cosine.data_ptr(), sine.data_ptr()) for cosine, sine in tables]
        needed = context.needed
        routes = [bound_route(context.route.layer_route(i)) for i in range(len(layers))] if context.route else []
        rows = last_route = None
        if needed is not None:
            rows = needed.rows.int().numpy()
            last_route = bound_route(needed.route.layer_route(len(layers) - 1)) if needed.route else None
        self._stack.forward(
            stream.data_ptr(), added.data_ptr(), context.step, pointers, routes, operands, torch.get_num_threads(), rows,
            last_route,
        )  # fmt: skip
        return (stream, added) if rows is None else (stream[: len(rows)], added[: len(rows)])

    def _bind_layer(self, layer: Layer, number: int) -> "_lori_cpu.Layer":
        qkv, output, gate_up, down = (product.bound for product in products(layer))
        return MODULE.Layer(
            layer.attention_norm.weight.numpy(), qkv, self._heads[number], self._rope_names.index(layer.rope), output,
            _weight(layer.attention_output_norm), layer.mlp_norm.weight.numpy(), gate_up, ACTIVATIONS.index(layer.activation),
            down, _weight(layer.mlp_output_norm), layer.mlp_norm.epsilon, self._memory[number].data_ptr(),
        )  # fmt: skip


def products(layer: Layer) -> list[NativeProjection]:
    """Return the native products of a layer, in their order."""
    return [
        projection
        for projection in (layer.qkv, layer.output, layer.gate_up, layer.down)
        if isinstance(projection, NativeProjection)
    ]


def _weight(norm: Norm | None) -> npt.NDArray[np.float32] | None:
    return None if norm is None else norm.weight.numpy()
