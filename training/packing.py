"""Batches without padding: the examples of a batch are concatenated to one row, and attention keeps them apart.

Shapes: T tokens of a batch, P predicted tokens, B examples of a group, L tokens of the group's longest example, H heads, G
key-value heads, E head size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from lori.errors import ModelError
from training.batches import MicroBatch
from training.data import Example, Pair

ATTENTION = "lori_packed"
"""The name under which transformers finds `packed_attention`."""

SUPPORTED_LAYERS = frozenset({"full_attention", "sliding_attention"})
"""Layer types, by transformers' names, in which the examples of a batch cannot read each other."""

MAX_PLAIN = 128
"""Maximum tokens of an example for plain matrix products on a CPU. Up to this length they are faster than torch's fused
attention, whose backward pass takes four times as long."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Examples as one row of tokens.

    The targets of examples with a cross-entropy loss come first; there are `num_ce_targets` of them. The targets of examples with
    a KL loss follow.

    `groups`: for each group of examples of similar length, the positions of their tokens in the row: (B, L), padded with -1.
    `example_indices`: the example of each target.
    `share`: the factor of each item's loss in the step's loss.
    `reference`: the examples on which the base's logits are computed. These are the examples with a KL loss, or all examples of
    pairs. A process without such examples computes one other example if another process has some.
    `adapter_weight`: the weight at which the adapter is applied.
    """

    input_ids: torch.Tensor  # (1, T)
    position_ids: torch.Tensor  # (1, T)
    groups: tuple[torch.Tensor, ...]
    predicting_positions: torch.Tensor  # (P,) positions whose next token is a target
    targets: torch.Tensor  # (P,)
    example_indices: torch.Tensor  # (P,)
    num_examples: int
    num_ce_targets: int
    share: float
    reference: "PackedBatch | None" = None
    adapter_weight: float = 1.0

    def to(self, device: torch.device) -> "PackedBatch":
        """Return the batch on `device`."""
        names = ("input_ids", "position_ids", "predicting_positions", "targets", "example_indices")
        moved = {name: getattr(self, name).to(device) for name in names}
        groups = tuple(positions.to(device) for positions in self.groups)
        return replace(self, **moved, groups=groups, reference=self.reference and self.reference.to(device))

    def sum_by_example(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of `values` (P,), one for each target, over the targets of each example: (num_examples,)."""
        return values.new_zeros(self.num_examples).index_add(0, self.example_indices, values)


def pack(micro_batch: MicroBatch) -> PackedBatch:
    """Return the examples of `micro_batch` concatenated, those with a KL loss last."""
    ce_examples = [example for item in micro_batch.items for example in item.examples if not example.uses_kl]
    kl_examples = [example for item in micro_batch.items for example in item.examples if example.uses_kl]
    batch = replace(_concatenate([*ce_examples, *kl_examples], micro_batch.share), adapter_weight=micro_batch.adapter_weight)
    if any(isinstance(item, Pair) for item in micro_batch.items):
        return replace(batch, reference=batch)
    reference = kl_examples or (ce_examples[:1] if micro_batch.needs_reference else [])
    num_ce_targets = sum(len(example) - example.num_prompt for example in ce_examples)
    return replace(
        batch,
        num_ce_targets=num_ce_targets,
        reference=_concatenate(reference, micro_batch.share) if reference else None,
    )


def _concatenate(examples: Sequence[Example], share: float) -> PackedBatch:
    start = 0
    groups: dict[int, list[torch.Tensor]] = {}
    predicting_positions: list[int] = []
    targets: list[int] = []
    example_indices: list[int] = []
    for index, example in enumerate(examples):
        end = start + len(example)
        groups.setdefault(len(example).bit_length(), []).append(torch.arange(start, end))
        predicting_positions += range(start + example.num_prompt - 1, end - 1)
        completion = example.ids[example.num_prompt :]
        targets += completion
        example_indices += [index] * len(completion)
        start = end
    return PackedBatch(
        input_ids=torch.tensor([[i for example in examples for i in example.ids]]),
        position_ids=torch.cat([torch.arange(len(example)) for example in examples])[None],
        groups=tuple(torch.nn.utils.rnn.pad_sequence(group, batch_first=True, padding_value=-1) for group in groups.values()),
        predicting_positions=torch.tensor(predicting_positions),
        targets=torch.tensor(targets),
        example_indices=torch.tensor(example_indices),
        num_examples=len(examples),
        num_ce_targets=len(targets),
        share=share,
    )


def check_layers(config: PretrainedConfig) -> None:
    """Raise `ModelError` if a model has layers in which packed examples would read each other, such as recurrent layers."""
    if unsupported := sorted(set(getattr(config, "layer_types", None) or ()) - SUPPORTED_LAYERS):
        raise ModelError(
            f"training a model with layers of the kind {', '.join(unsupported)} is not supported: attention alone is"
        )


def max_example_length(config: PretrainedConfig) -> int | None:
    """Return the maximum tokens of an example for a model with sliding-window attention: its window. None for other models."""
    layer_types = getattr(config, "layer_types", None)
    return None if layer_types and "sliding_attention" not in layer_types else getattr(config, "sliding_window", None)


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
    """Return causal attention inside each example: (1, T, H, E), from `query` (1, H, T, E), `key` and `value` (1, G, T, E).

    Padding follows the tokens of an example, where the causal mask hides it. Raises `ModelError` for capped scores, for attention
    sinks, and for examples longer than a sliding window; none of these is supported.
    """
    if s_aux is not None:
        raise ModelError("training a model with attention sinks is not supported")
    if softcap is not None:
        raise ModelError("training a model that caps its attention scores is not supported")
    if sliding_window is not None and any(positions.shape[1] > sliding_window for positions in groups):
        raise ModelError(f"an example is longer than the model's sliding window: pass --max-length {sliding_window}")
    out = torch.empty_like(query[0].transpose(0, 1))  # (T, H, E)
    for positions in groups:
        is_token = positions >= 0
        q, k, v = (x[0][:, positions.clamp(min=0)].transpose(0, 1) for x in (query, key, value))  # (B, H|G, L, E)
        attend = _plain_attention if q.shape[2] <= MAX_PLAIN and q.device.type == "cpu" else _fused_attention
        out = out.index_put((positions[is_token],), attend(q, k, v, scaling).transpose(1, 2)[is_token])
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
def use_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Context manager: `model` uses the attention function that is registered in transformers as `name`; restored afterwards."""
    previous = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(previous)
