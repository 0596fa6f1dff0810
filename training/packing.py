"""Batches without padding: the examples of a batch lie one behind the other, and attention alone keeps them apart.

Shapes: T tokens of a batch, P of them predicted, B examples of a group, L the longest of them, H heads, G key-value heads, E head
size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from lori.errors import ModelError
from training.batches import Part
from training.data import Example, Pair

ATTENTION = "lori_packed"
"""The name under which transformers finds `packed_attention`."""

KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})
"""Kinds of layers, as transformers calls them, that keep the examples of a batch apart."""

MAX_PLAIN = 128
"""Tokens up to which plain products are faster on a CPU than its fused attention, which takes four times as long backwards."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Some examples as one row of tokens.

    `groups`: for examples of like length, the places of their tokens in the row, (B, L), -1 where an example is shorter.
    `owners`: which example a target is of, in the order of the row. `share`: what each item is of the loss.
    `weight`: at which the adapter is applied.
    The targets of the examples that keep the base come last, behind `num_learnt` others. `base`: the examples on which the base
    is asked: those that keep it, all of pairs, or where a process has none and others have, another.
    """

    input_ids: torch.Tensor  # (1, T)
    position_ids: torch.Tensor  # (1, T)
    groups: tuple[torch.Tensor, ...]
    predicting: torch.Tensor  # (P,) places whose next token is a target
    targets: torch.Tensor  # (P,)
    owners: torch.Tensor  # (P,)
    num_examples: int
    num_learnt: int
    share: float
    base: "PackedBatch | None" = None
    weight: float = 1.0

    def to(self, device: torch.device) -> "PackedBatch":
        """Return the batch on `device`."""
        names = ("input_ids", "position_ids", "predicting", "targets", "owners")
        moved = {name: getattr(self, name).to(device) for name in names}
        groups = tuple(places.to(device) for places in self.groups)
        return replace(self, **moved, groups=groups, base=self.base and self.base.to(device))

    def by_example(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of `values` (P,), one of each target, over the targets of each example."""
        return values.new_zeros(self.num_examples).index_add(0, self.owners, values)


def pack(part: Part) -> PackedBatch:
    """Lay the examples of `part` one behind the other, those that keep the base last."""
    learnt = [example for item in part.items for example in item.examples if not example.keeps_base]
    kept = [example for item in part.items for example in item.examples if example.keeps_base]
    batch = replace(_lay([*learnt, *kept], part.share), weight=part.weight)
    if any(isinstance(item, Pair) for item in part.items):
        return replace(batch, base=batch)
    asked = kept or (learnt[:1] if part.asks_base else [])
    num_learnt = sum(len(example) - example.num_prompt for example in learnt)
    return replace(batch, num_learnt=num_learnt, base=_lay(asked, part.share) if asked else None)


def _lay(examples: Sequence[Example], share: float) -> PackedBatch:
    start = 0
    places: dict[int, list[torch.Tensor]] = {}
    predicting: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for number, example in enumerate(examples):
        end = start + len(example)
        places.setdefault(len(example).bit_length(), []).append(torch.arange(start, end))
        predicting += range(start + example.num_prompt - 1, end - 1)
        completion = example.ids[example.num_prompt :]
        targets += completion
        owners += [number] * len(completion)
        start = end
    return PackedBatch(
        input_ids=torch.tensor([[i for example in examples for i in example.ids]]),
        position_ids=torch.cat([torch.arange(len(example)) for example in examples])[None],
        groups=tuple(torch.nn.utils.rnn.pad_sequence(group, batch_first=True, padding_value=-1) for group in places.values()),
        predicting=torch.tensor(predicting),
        targets=torch.tensor(targets),
        owners=torch.tensor(owners),
        num_examples=len(examples),
        num_learnt=len(targets),
        share=share,
    )


def check_layers(config: PretrainedConfig) -> None:
    """Raise `ModelError` where a model has layers in which packed examples would read each other, as recurrent ones."""
    if others := sorted(set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS):
        raise ModelError(f"training a model with layers of the kind {', '.join(others)} is not supported: attention alone is")


def max_example(config: PretrainedConfig) -> int | None:
    """Return how many tokens an example may have where attention slides over a window; None where it does not."""
    kinds = getattr(config, "layer_types", None)
    return None if kinds and "sliding_attention" not in kinds else getattr(config, "sliding_window", None)


def packed_attention(
    module: torch.nn.Module,  # noqa: ARG001  # transformers' signature
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001  # the groups say which tokens belong together
    *,
    groups: Sequence[torch.Tensor],
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each example: (1, H, T, E) and (1, G, T, E) give (1, T, H, E).

    Padding stands behind the tokens of an example, where a causal mask hides it. Raises `ModelError` for what it does not do:
    scores with a soft cap, attention sinks, and examples that outgrow a sliding window.
    """
    if s_aux is not None:
        raise ModelError("training a model with attention sinks is not supported")
    if softcap is not None:
        raise ModelError("training a model that caps its attention scores is not supported")
    if sliding_window is not None and any(places.shape[1] > sliding_window for places in groups):
        raise ModelError(f"an example is longer than the model's sliding window: pass --max-length {sliding_window}")
    out = torch.empty_like(query[0].transpose(0, 1))  # (T, H, E)
    for places in groups:
        real = places >= 0
        q, k, v = (x[0][:, places.clamp(min=0)].transpose(0, 1) for x in (query, key, value))  # (B, H|G, L, E)
        attend = _plain_attention if q.shape[2] <= MAX_PLAIN and q.device.type == "cpu" else _fused_attention
        out = out.index_put((places[real],), attend(q, k, v, scaling).transpose(1, 2)[real])
    return out[None], None


def _fused_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    length, repeats = q.shape[2], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))  # (B, H, L, E)
    causal = torch.full((length, length), float("-inf"), dtype=q.dtype).triu(1)
    flat = (q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))  # (B H, L, E), (B H, E, L)
    scores = torch.baddbmm(causal.expand(len(flat[0]), length, length), *flat, alpha=scale)
    return (scores.softmax(-1) @ v.flatten(0, 1)).view(q.shape)


AttentionInterface.register(ATTENTION, packed_attention)


@contextmanager
def attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Inside, `model` attends by the function that transformers knows as `name`; afterwards as before."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
