"""One phase of training: steps over planned batches, with checkpoints. Knows nothing of masks, adapters or files' formats."""

import math
import os
import pickle
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from training.data import DataError, Example
from training.packing import PackedBatch, pack
from training.trainable import base_alone

State = dict[str, Any]


def completion_logits(model: PreTrainedModel, batch: PackedBatch) -> torch.Tensor:
    """Returns the logits (P, V) fp32 that predict the completions' tokens; others are not computed."""
    logits: torch.Tensor = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=batch.predicting,
        groups=batch.groups,
    ).logits
    return logits[0].float()


def completion_loss(model: PreTrainedModel, examples: Sequence[Example]) -> torch.Tensor:
    """Returns the loss on the completions' tokens: a mean in each example, then a mean over examples.

    It is the cross-entropy where an example is learnt, and KL(base || adapted) where it keeps the base.
    """
    batch = pack(examples)
    scores = completion_logits(model, batch).log_softmax(-1)
    learnt, kept = scores.split([batch.num_learnt, len(scores) - batch.num_learnt])
    losses = F.nll_loss(learnt, batch.targets[: batch.num_learnt], reduction="none")
    if len(kept):
        with torch.no_grad(), base_alone(model):
            base = completion_logits(model, pack([e for e in examples if e.keeps_base])).log_softmax(-1)
        losses = torch.cat([losses, F.kl_div(kept, base, reduction="none", log_target=True).sum(-1)])
    return (losses * batch.weights).sum()


def rate_at(step: int, num_steps: int, warmup: float) -> float:
    """Returns the share of the peak rate at `step`: a linear rise, then a cosine to zero."""
    num_warmup = max(1, round(num_steps * warmup))
    if step < num_warmup:
        return (step + 1) / num_warmup
    return 0.5 * (1 + math.cos(math.pi * (step - num_warmup) / max(1, num_steps - num_warmup)))


class Phase:
    """One phase of training, resumable at any step."""

    def __init__(
        self, name: str, model: PreTrainedModel, batches: Sequence[Sequence[Example]], lr: float, warmup: float, max_norm: float
    ) -> None:
        self.name, self.model, self.batches, self.max_norm = name, model, batches, max_norm
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=lr, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: rate_at(step, len(batches), warmup))
        self.step = 0
        self.losses: list[float] = []

    def state(self) -> State:
        """Returns all that `restore` needs."""
        return {
            "name": self.name,
            "step": self.step,
            "losses": self.losses,
            "parameters": {n: p.detach() for n, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def restore(self, state: State) -> None:
        """Goes back to where `state` was taken."""
        assert state["name"] == self.name
        self.step, self.losses = state["step"], state["losses"]
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])

    def run(self, save_every: int, save: Callable[[State], None]) -> None:
        """Trains to the last batch, with a bar of loss, tokens/s and time left.

        Calls `save` every `save_every` steps and at the end.
        """
        started, num_tokens = time.monotonic(), 0
        with tqdm(total=len(self.batches), initial=self.step, desc=self.name, unit="step") as bar:
            for examples in self.batches[self.step :]:
                self.losses.append(self._train_on(examples))
                self.step += 1
                num_tokens += sum(map(len, examples))
                recent = self.losses[-20:]
                rate = num_tokens / (time.monotonic() - started)
                bar.set_postfix(loss=f"{sum(recent) / len(recent):.3f}", tokens_per_s=f"{rate:.0f}", refresh=False)
                bar.update()
                if self.step % save_every == 0 or self.step == len(self.batches):
                    save(self.state())

    def _train_on(self, examples: Sequence[Example]) -> float:
        loss = completion_loss(self.model, examples)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), self.max_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def write_checkpoint(path: Path, state: State) -> None:
    """Writes `state` aside, then renames it: a crash leaves the old checkpoint or the new one."""
    scratch = path.with_suffix(".part")
    torch.save(state, scratch)
    os.replace(scratch, path)


def read_checkpoint(path: Path) -> State:
    """Reads what `write_checkpoint` wrote; tensors and plain values only. Raises `DataError` where it is not whole."""
    try:
        state: State = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise DataError(f"{path} is no checkpoint that can be read: {error}") from error
    return state
