"""Losses of a batch: cross-entropy of examples, KL(base || adapted) of mixed-in examples, and DPO of pairs.

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
AdapterDisabled = Callable[[], AbstractContextManager[None]]
"""Function that returns a context manager in which the model computes without the adapter, as the base alone."""


def completion_logits(model: nn.Module, batch: PackedBatch) -> torch.Tensor:
    """Return the logits (P, V) fp32 that predict the tokens of the completions. No other logits are computed."""
    logits: torch.Tensor = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=batch.predicting_positions,
        groups=batch.groups,
    ).logits
    return logits[0].float()


@dataclass(frozen=True, slots=True)
class CompletionLoss:
    """Cross-entropy and KL loss: a mean over each example's tokens, then over the examples."""

    adapter_disabled: AdapterDisabled

    def __call__(self, model: nn.Module, batch: PackedBatch) -> torch.Tensor:
        """Return the contribution of `batch` to its step's loss."""
        log_probs = completion_logits(model, batch).log_softmax(-1)
        ce_log_probs, kl_log_probs = log_probs.split([batch.num_ce_targets, len(log_probs) - batch.num_ce_targets])
        losses = F.nll_loss(ce_log_probs, batch.targets[: batch.num_ce_targets], reduction="none")
        if batch.reference:
            with torch.no_grad(), self.adapter_disabled():
                base_log_probs = completion_logits(model, batch.reference).log_softmax(-1)
            if len(kl_log_probs):
                losses = torch.cat([losses, F.kl_div(kl_log_probs, base_log_probs, reduction="none", log_target=True).sum(-1)])
        counts = batch.sum_by_example(torch.ones_like(losses))
        return batch.share * (batch.sum_by_example(losses) / counts).sum()


@dataclass(frozen=True, slots=True)
class PreferenceLoss:
    """DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7). The reference model is the base."""

    adapter_disabled: AdapterDisabled
    beta: float

    def __call__(self, model: nn.Module, batch: PackedBatch) -> torch.Tensor:
        """Return the contribution of `batch`, whose items are pairs, to its step's loss."""
        assert batch.reference
        with torch.no_grad(), self.adapter_disabled():
            reference = log_probabilities(model, batch.reference)
        gains = (log_probabilities(model, batch) - reference).view(-1, 2)  # (E / 2, chosen and rejected)
        return -batch.share * F.logsigmoid(self.beta * (gains[:, 0] - gains[:, 1])).sum()


def log_probabilities(model: nn.Module, batch: PackedBatch) -> torch.Tensor:
    """Return the log-probability (E,) of each example's completion."""
    scores = -F.cross_entropy(completion_logits(model, batch), batch.targets, reduction="none")
    return batch.sum_by_example(scores)
