"""A decoder's forward pass over a step's tokens: transformers' modules and weights, our products, norms and attention.

What differs between the families that are served is read in `families`. A pass makes no mask, and logits where they are wanted.
Shapes: T tokens of a step, D width, P rows whose logits are wanted, V vocabulary, E head size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lori.kernels import Route
from lori.projection import Projection


@dataclass(frozen=True, slots=True)
class Span:
    """The step's tokens [row, row + num_tokens) stand at the positions from `position` on of a sequence with these `blocks`."""

    row: int
    num_tokens: int
    position: int
    blocks: Sequence[int]


Turns = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine (T, E) fp32 of each token's position."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """x / rms(x) * weight; `weight` (D,) fp32."""

    weight: torch.Tensor
    epsilon: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """An attention's heads: `window` keys are seen, a token's own among them, where it is not 0; `softcap` 0 is none."""

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
    """One layer: `qkv` reads `attention_norm` of the stream, `gate_up` reads `mlp_norm` of it; Gemma norms what they add, too."""

    attention_norm: Norm
    qkv: Projection
    heads: Heads
    turn: str
    """Which turns its attention takes."""
    output: Projection
    attention_output_norm: Norm | None
    mlp_norm: Norm
    gate_up: Projection
    num_inner: int
    """Values between the MLP's products."""
    activation: str
    down: Projection
    mlp_output_norm: Norm | None


class Ops(Protocol):
    """What a layer does beside its products, and the memory of its keys and values."""

    num_bytes: int

    def plan(self, spans: Sequence[Span]) -> object:
        """Return the step of `spans`, those of one token first, for `attend`."""

    def norm(self, stream: torch.Tensor, added: torch.Tensor | None, norm: Norm) -> torch.Tensor:
        """Return the norm of `stream` (T, D), to which `added` (T, D) is added before, in place."""

    def gate(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """Return activation(x[:, :I]) * x[:, I:] (T, I) for x (T, 2 I)."""

    def attend(self, qkv: torch.Tensor, layer: int, heads: Heads, turns: Turns, step: object) -> torch.Tensor:
        """Write the step's keys and values and return what its tokens attend to, (T, H E); qkv (T, (H + 2 G) E) is used up."""

    def run(
        self, layers: Sequence[Layer], stream: torch.Tensor, turns: Mapping[str, Turns], step: object, route: Route | None
    ) -> torch.Tensor:
        """Add to `stream` (T, D) what all layers give but the last MLP, and return that (T, D): `run_layers`, or as it does."""


def run_layers(
    ops: Ops, layers: Sequence[Layer], stream: torch.Tensor, turns: Mapping[str, Turns], step: object, route: Route | None
) -> torch.Tensor:
    """Run the layers by the operations of `ops`, as its `run` says."""
    added: torch.Tensor | None = None
    for number, layer in enumerate(layers):
        qkv = layer.qkv(ops.norm(stream, added, layer.attention_norm), route)
        added = layer.output(ops.attend(qkv, number, layer.heads, turns[layer.turn], step), route)
        if layer.attention_output_norm is not None:
            added = ops.norm(added, None, layer.attention_output_norm)
        hidden = layer.gate_up(ops.norm(stream, added, layer.mlp_norm), route)
        added = layer.down(ops.gate(hidden, layer.activation), route)
        if layer.mlp_output_norm is not None:
            added = ops.norm(added, None, layer.mlp_output_norm)
    assert added is not None
    return added


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A whole model."""

    embed: Callable[[torch.Tensor], torch.Tensor]
    turns: Callable[[torch.Tensor], Mapping[str, Turns]]
    """Gives the turns of positions (T,) int64."""
    layers: Sequence[Layer]
    norm: Norm
    head: Projection
    logit_softcap: float = 0.0

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, ops: Ops, step: object, route: Route | None
    ) -> torch.Tensor:
        """Return the logits (P, V) fp32 at `rows` (P,) of the tokens `ids` (T,), which stand at `positions` (T,)."""
        stream = self.embed(ids)
        added = ops.run(self.layers, stream, self.turns(positions), step, route)
        logits = self.head(ops.norm(stream[rows], added[rows], self.norm), None).float()
        if self.logit_softcap:
            logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        return logits
