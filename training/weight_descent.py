"""Gradient descent on the weights of a merge. The base and the adapters stay as they are.

A merge computes y + sum_i w_i B_i (A_i x) in each layer, where w_i is the adapter's weight in the layer's block. So the weights
have gradients as parameters do, at the cost of one backward pass through the base's layers.

Shapes: N inputs, D outputs, R ranks of all adapters together.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lori.adapter import Adapter, common_shapes
from lori.base_model import BaseModel
from lori.identity import layer_of
from lori.merge import blocks_of_layers
from training.batches import MicroBatch, group_by_length, shuffled_forever
from training.data import Example
from training.loss import completion_logits
from training.packing import ATTENTION, check_layers, pack, use_attention
from training.progress import TrainingError
from training.weight_trials import NUM_DIGITS, Weights

LR = 0.1
"""Adam's learning rate, in weights a step. In the second half of the steps it falls to zero."""
BATCH_TOKENS = 4096
"""Maximum tokens of one forward and backward pass, unless one example is longer."""


@dataclass(frozen=True, slots=True)
class DescentOptions:
    """Options of the steps."""

    num_steps: int
    batch_size: int
    """Examples of a step. The sources have equal parts, of one example at least."""
    max_weight: float
    """The largest weight. The smallest is its negative."""
    seed: int
    """Seed for the order of the examples."""


class WeightDescent:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980) on the weights of `adapters` in `num_blocks` blocks of layers.

    It lowers the mean over the sources of the loss, in nats a token, divided by the source's `gains`.
    """

    def __init__(
        self,
        base: BaseModel,
        adapters: Sequence[Adapter],
        examples: Mapping[str, Sequence[Example]],
        gains: Mapping[str, float],
        num_blocks: int,
    ) -> None:
        check_layers(base.model.config.get_text_config())
        self.model, self.examples, self.gains = base.model, examples, gains
        self.weights = nn.Parameter(torch.ones(len(adapters), num_blocks, device=base.model.device))
        self.hooks = _hooks(base, adapters, self.weights)

    def descend(self, start: Weights, options: DescentOptions) -> Iterator[Weights]:
        """Yield the weights after each step from `start`, with `NUM_DIGITS` decimal places.

        Between the steps the model is as before, bit for bit. Raises `TrainingError` at a loss that is not finite.
        """
        with torch.no_grad():
            self.weights.copy_(torch.tensor(start).view_as(self.weights))
        optimizer = torch.optim.Adam([self.weights], lr=LR)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, 2 - 2 * step / options.num_steps))
        for step, batch in enumerate(self._batches(options), 1):
            optimizer.zero_grad()
            if not math.isfinite(loss := self.backward(batch)):
                raise TrainingError(f"the loss is {loss} at step {step}: lower --max-weight, now {options.max_weight:g}")
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                self.weights.clamp_(-options.max_weight, options.max_weight)
            yield tuple(round(weight, NUM_DIGITS) + 0.0 for weight in self.weights.detach().flatten().tolist())  # never -0.0

    def backward(self, batch: Mapping[str, Sequence[Example]]) -> float:
        """Add the loss's gradient at `weights` to `weights.grad`, and return the loss: the mean over the sources in `batch`."""
        examples, factors = list[Example](), list[float]()
        for source, source_examples in batch.items():
            num_tokens = sum(len(example) - example.num_prompt for example in source_examples)
            examples += source_examples
            factors += [1 / (num_tokens * self.gains[source] * len(batch))] * len(source_examples)
        total = 0.0
        for indices in group_by_length([len(example) for example in examples], BATCH_TOKENS):
            packed = pack(MicroBatch(tuple(examples[i] for i in indices), 1.0)).to(self.model.device)
            with self._applied():
                losses = F.cross_entropy(completion_logits(self.model, packed), packed.targets, reduction="none")
            loss = packed.sum_by_example(losses) @ torch.tensor([factors[i] for i in indices], device=losses.device)
            loss.backward()
            total += loss.item()
        return total

    @contextmanager
    def _applied(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(use_attention(self.model, ATTENTION))
            for name, hook in self.hooks.items():
                stack.callback(self.model.get_submodule(name).register_forward_hook(hook).remove)
            yield

    def _batches(self, options: DescentOptions) -> Iterator[Mapping[str, Sequence[Example]]]:
        """Yield the examples of each step, by source. All of a source are seen before any is seen again."""
        count = max(1, options.batch_size // len(self.examples))
        rng = random.Random(options.seed)
        orders = {source: shuffled_forever(len(examples), rng) for source, examples in self.examples.items()}
        for _ in range(options.num_steps):
            yield {source: [examples[next(orders[source])] for _ in range(count)] for source, examples in self.examples.items()}


@dataclass(frozen=True, slots=True)
class _WeightedHook:
    """Forward hook that adds the weighted sum of B_i (A_i x) to a layer's output, with the sum in fp32."""

    a: torch.Tensor  # (R, N): the adapters' A's, one after the other
    scaled_b: torch.Tensor  # (D, R) fp32
    weights: nn.Parameter
    weight_indices: torch.Tensor  # (R,): the weight of each rank, in the flattened weights

    def __call__(self, _: nn.Module, inputs: tuple[Any, ...], y: torch.Tensor) -> torch.Tensor:
        s = F.linear(inputs[0], self.a).float() * self.weights.flatten()[self.weight_indices]  # (…, R)
        return (y + F.linear(s, self.scaled_b)).to(y.dtype)


def _hooks(base: BaseModel, adapters: Sequence[Adapter], weights: nn.Parameter) -> dict[str, _WeightedHook]:
    """Return the hook of each module that an adapter changes."""
    blocks = [blocks_of_layers(tuple(adapter.modules), weights.shape[1]) for adapter in adapters]
    hooks = {}
    for module, (_, num_inputs) in common_shapes(adapters).items():
        indexed = [(i, adapter) for i, adapter in enumerate(adapters) if module in adapter.modules]
        ranks = [adapter.modules[module].shape[1] for _, adapter in indexed]
        a = torch.cat([adapter.basis.draw(module, rank, num_inputs) for (_, adapter), rank in zip(indexed, ranks, strict=True)])
        b = torch.cat([adapter.config.scale_of(module) * adapter.modules[module].dense() for _, adapter in indexed], 1)
        indices = [i * weights.shape[1] + blocks[i][layer_of(module)] for i, _ in indexed]
        hooks[module] = _WeightedHook(
            a.to(base.model.device, base.model.dtype),
            b.to(base.model.device),
            weights,
            torch.tensor(indices).repeat_interleave(torch.tensor(ranks)).to(base.model.device),
        )
    return hooks
