"""A decoder's forward pass over a step's tokens: transformers' modules and weights, our products, norms and attention.

The differences between model families are read in `families`. A pass computes no attention mask, and logits only where they are
needed. Shapes: T tokens of a step, D width, P rows whose logits are needed, V vocabulary, E head size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lori.kernels import Route
from lori.projection import Projection


@dataclass(frozen=True, slots=True)
class Span:
    """The step's tokens [row, row + num_tokens) of one sequence: positions from `position` on, keys in `blocks`."""

    row: int
    num_tokens: int
    position: int
    blocks: Sequence[int]


Rotary = tuple[torch.Tensor, torch.Tensor]
"""RoPE tables: cosine and sine (T, E) fp32 of each token's position."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """RMS norm: x / rms(x) * weight; `weight` (D,) fp32."""

    weight: torch.Tensor
    epsilon: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """The heads of an attention layer.

    Each token attends to the last `window` keys, its own among them; 0 attends to all. `softcap` 0 caps no scores.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    query_norm: Norm | None = None
    key_norm: Norm | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One decoder layer.

    `qkv` reads the `attention_norm` of the residual stream, `gate_up` its `mlp_norm`. Gemma also has norms of the attention's
    and the MLP's output.
    """

    attention_norm: Norm
    qkv: Projection
    heads: Heads
    rope: str
    """Key of the layer's RoPE tables."""
    output: Projection
    attention_output_norm: Norm | None
    mlp_norm: Norm
    gate_up: Projection
    num_inner: int
    """Width between the MLP's products."""
    activation: str
    down: Projection
    mlp_output_norm: Norm | None


@dataclass(frozen=True, slots=True)
class NeededRows:
    """The rows of a step whose logits are needed. After its attention the last layer computes no others."""

    rows: torch.Tensor
    """(P,) int64, ascending"""
    route: Route | None
    """The step's route for these rows alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardContext:
    """Inputs of a forward pass that all its layers share."""

    rotary: Mapping[str, Rotary]
    """RoPE tables, by `Layer.rope`."""
    step: object
    """Result of `Ops.plan`, which only the same operations read."""
    route: Route | None = None
    """The adapters of the tokens; None if no token has one."""
    needed: NeededRows | None = None
    """Rows whose logits are needed; None if all are."""


class Ops(Protocol):
    """Operations of a layer other than its products, and the memory of keys and values."""

    num_bytes: int

    def plan(self, spans: Sequence[Span]) -> object:
        """Return the step of `spans`, for `attend`. Spans of one token come first."""

    def norm(self, stream: torch.Tensor, added: torch.Tensor | None, norm: Norm) -> torch.Tensor:
        """Add `added` (T, D) to `stream` (T, D) in place, and return the norm (T, D) of the result."""

    def gate(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """Return activation(x[:, :I]) * x[:, I:] (T, I) for x (T, 2 I)."""

    def attend(self, qkv: torch.Tensor, layer: int, heads: Heads, rotary: Rotary, step: object) -> torch.Tensor:
        """Write the step's keys and values, and return the attention output (T, H E). Overwrites qkv (T, (H + 2 G) E)."""

    def run(self, layers: Sequence[Layer], stream: torch.Tensor, context: ForwardContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `stream` (T, D) plus the outputs of all layers but the last MLP, and the last MLP's output (T, D).

        If the context has needed rows, both have these alone, (P, D). Overwrites `stream`. Gives the result of `run_layers`.
        """


def run_layers(
    ops: Ops, layers: Sequence[Layer], stream: torch.Tensor, context: ForwardContext
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the layers with the operations of `ops`, as specified by `Ops.run`."""
    needed = context.needed
    added: torch.Tensor | None = None
    for number, layer in enumerate(layers):
        route = context.route and context.route.layer_route(number)
        qkv = layer.qkv(ops.norm(stream, added, layer.attention_norm), route)
        attended = ops.attend(qkv, number, layer.heads, context.rotary[layer.rope], context.step)
        if needed is not None and number + 1 == len(layers):
            stream, attended = stream[needed.rows], attended[needed.rows]
            route = needed.route and needed.route.layer_route(number)
        added = layer.output(attended, route)
        if layer.attention_output_norm is not None:
            added = ops.norm(added, None, layer.attention_output_norm)
        hidden = layer.gate_up(ops.norm(stream, added, layer.mlp_norm), route)
        added = layer.down(ops.gate(hidden, layer.activation), route)
        if layer.mlp_output_norm is not None:
            added = ops.norm(added, None, layer.mlp_output_norm)
    assert added is not None
    return stream, added


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A whole model."""

    embed: Callable[[torch.Tensor], torch.Tensor]
    rotary: Callable[[torch.Tensor], Mapping[str, Rotary]]
    """Computes the RoPE tables of positions (T,) int64, by key."""
    layers: Sequence[Layer]
    norm: Norm
    head: Projection
    logit_softcap: float = 0.0

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        ops: Ops,
        step: object,
        route: Route | None,
        needed: NeededRows | None = None,
    ) -> torch.Tensor:
        """Return the logits (T, V) fp32 of the tokens `ids` (T,), which stand at `positions` (T,); (P, V) with `needed`."""
        context = ForwardContext(rotary=self.rotary(positions), step=step, route=route, needed=needed)
        stream, added = ops.run(self.layers, self.embed(ids), context)
        logits = self.head(ops.norm(stream, added, self.norm), None).float()
        if self.logit_softcap:
            logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        return logits
