"""Batches without padding: the examples of a batch lie one behind the other, and attention alone keeps them apart.

Shapes: T tokens of a batch, B examples of a group, L the longest of them, H heads, G key-value heads, E head size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from lori.errors import ModelError
from training.data import Example

ATTENTION = "lori_packed"
"""The name under which transformers finds `packed_attention`."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Some examples as one row of tokens.

    `groups`: for examples of like length, the places of their tokens in the row, (B, L), -1 where an example is shorter.
    `weights`: the share of each target in the loss; every example has the same share, whatever its length.
    The targets of the examples that keep the base come last: `num_learnt` stand before them.
    """

    input_ids: torch.Tensor  # (1, T)
    position_ids: torch.Tensor  # (1, T)
    groups: tuple[torch.Tensor, ...]
    predicting: torch.Tensor  # (P,) places whose next token is a target
    targets: torch.Tensor  # (P,)
    weights: torch.Tensor  # (P,) fp32, sum 1
    num_learnt: int

    def to(self, device: torch.device) -> "PackedBatch":
        """Returns the batch on `device`."""
        names = ("input_ids", "position_ids", "predicting", "targets", "weights")
        moved = {name: getattr(self, name).to(device) for name in names}
        return replace(self, groups=tuple(places.to(device) for places in self.groups), **moved)


def pack(examples: Sequence[Example]) -> PackedBatch:
    """Lays `examples` one behind the other, those that keep the base last."""
    examples = sorted(examples, key=lambda example: example.keeps_base)
    starts = [0]
    for example in examples:
        starts.append(starts[-1] + len(example))
    places: dict[int, list[torch.Tensor]] = {}
    predicting: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    for example, start in zip(examples, starts, strict=False):
        places.setdefault(len(example).bit_length(), []).append(torch.arange(start, start + len(example)))
        predicting += range(start + example.num_prompt - 1, start + len(example) - 1)
        completion = example.ids[example.num_prompt :]
        targets += completion
        weights += [1 / len(completion) / len(examples)] * len(completion)
    return PackedBatch(
        input_ids=torch.tensor([[i for example in examples for i in example.ids]]),
        position_ids=torch.cat([torch.arange(len(example)) for example in examples])[None],
        groups=tuple(torch.nn.utils.rnn.pad_sequence(group, batch_first=True, padding_value=-1) for group in places.values()),
        predicting=torch.tensor(predicting),
        targets=torch.tensor(targets),
        weights=torch.tensor(weights),
        num_learnt=sum(len(example) - example.num_prompt for example in examples if not example.keeps_base),
    )


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
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each example: (1, H, T, E) and (1, G, T, E) give (1, T, H, E).

    Padding stands behind the tokens of an example, where a causal mask hides it. Raises `ModelError` for what it does not do:
    scores with a soft cap, and examples that outgrow a sliding window.
    """
    if softcap is not None:
        raise ModelError("training a model that caps its attention scores is not supported")
    if sliding_window is not None and any(places.shape[1] > sliding_window for places in groups):
        raise ModelError(f"an example is longer than the model's sliding window: pass --max-length {sliding_window}")
    out = torch.empty_like(query[0].transpose(0, 1))  # (T, H, E)
    for places in groups:
        real = places >= 0
        q, k, v = (x[0][:, places.clamp(min=0)].transpose(0, 1) for x in (query, key, value))  # (B, H|G, L, E)
        group = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
        out = out.index_put((places[real],), group.transpose(1, 2)[real])
    return out[None], None


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
