"""What a batch costs. Examples: cross-entropy where one is learnt, KL(base || adapted) where it keeps the base. Pairs: DPO.

Shapes: P predicted tokens, V vocabulary, E examples.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from training.packing import PackedBatch

Loss = Callable[[nn.Module, PackedBatch], torch.Tensor]
BaseAlone = Callable[[], AbstractContextManager[None]]
"""Inside, the model is the base as it was."""


def completion_logits(model: nn.Module, batch: PackedBatch) -> torch.Tensor:
    """Return the logits (P, V) fp32 that predict the completions' tokens; others are not computed."""
    logits: torch.Tensor = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=batch.predicting,
        groups=batch.groups,
    ).logits
    return logits[0].float()


@dataclass(frozen=True, slots=True)
class CompletionLoss:
    """A mean over each example's tokens, then over the examples."""

    base_alone: BaseAlone

    def __call__(self, model: nn.Module, batch: PackedBatch) -> torch.Tensor:
        """Return the share of `batch` in its step's loss."""
        scores = completion_logits(model, batch).log_softmax(-1)
        learnt, kept = scores.split([batch.num_learnt, len(scores) - batch.num_learnt])
        losses = F.nll_loss(learnt, batch.targets[: batch.num_learnt], reduction="none")
        if batch.base:
            with torch.no_grad(), self.base_alone():
                base = completion_logits(model, batch.base).log_softmax(-1)
            if len(kept):
                losses = torch.cat([losses, F.kl_div(kept, base, reduction="none", log_target=True).sum(-1)])
        counts = batch.by_example(torch.ones_like(losses))
        return batch.share * (batch.by_example(losses) / counts).sum()


@dataclass(frozen=True, slots=True)
class PreferenceLoss:
    """DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7); its reference is the base."""

    base_alone: BaseAlone
    beta: float

    def __call__(self, model: nn.Module, batch: PackedBatch) -> torch.Tensor:
        """Return the share of `batch`, whose items are pairs, in its step's loss."""
        assert batch.base
        with torch.no_grad(), self.base_alone():
            reference = log_probabilities(model, batch.base)
        gains = (log_probabilities(model, batch) - reference).view(-1, 2)  # (E / 2, chosen and rejected)
        return -batch.share * F.logsigmoid(self.beta * (gains[:, 0] - gains[:, 1])).sum()


def log_probabilities(model: nn.Module, batch: PackedBatch) -> torch.Tensor:
    """Return the log-probability (E,) of each example's completion."""
    scores = -F.cross_entropy(completion_logits(model, batch), batch.targets, reduction="none")
    return batch.by_example(scores)
