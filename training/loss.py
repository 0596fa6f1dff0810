"""The loss of a batch: cross-entropy where an example is learnt, KL(base || adapted) where it keeps the base.

Shapes: P predicted tokens, V vocabulary.
"""

import torch
from torch import nn
from torch.nn import functional as F

from training.packing import PackedBatch
from training.trainable import base_alone


def completion_logits(model: nn.Module, batch: PackedBatch) -> torch.Tensor:
    """Returns the logits (P, V) fp32 that predict the completions' tokens; others are not computed."""
    logits: torch.Tensor = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=batch.predicting,
        groups=batch.groups,
    ).logits
    return logits[0].float()


def completion_loss(model: nn.Module, batch: PackedBatch) -> torch.Tensor:
    """Returns the loss on the completions' tokens: a mean in each example, then the sum by `batch.weights`."""
    scores = completion_logits(model, batch).log_softmax(-1)
    learnt, kept = scores.split([batch.num_learnt, len(scores) - batch.num_learnt])
    losses = F.nll_loss(learnt, batch.targets[: batch.num_learnt], reduction="none")
    if batch.base:
        with torch.no_grad(), base_alone(model):
            base = completion_logits(model, batch.base).log_softmax(-1)
        if len(kept):
            losses = torch.cat([losses, F.kl_div(kept, base, reduction="none", log_target=True).sum(-1)])
    return (losses * batch.weights).sum()
