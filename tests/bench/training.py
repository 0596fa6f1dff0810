"""Speed and memory of a training step: LoRI-S, LoRI-D and PEFT's LoRA, interleaved on the same batches.

`python -m tests.bench.training`
"""

import argparse
import random
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lori.base_model import default_dtype
from lori.cli.output import print_table
from tests.bench.machine import machine, versions
from tests.bench.timing import timed
from training.base import load_base
from training.batches import MicroBatch
from training.config import FitConfig
from training.data import Example
from training.loss import CompletionLoss
from training.methods import TrainingMethod, create_method
from training.packing import ATTENTION, PackedBatch, pack
from training.phase import phases_of

METHODS = ("lora", "lori-d", "lori")


@dataclass(frozen=True, slots=True)
class Footprint:
    """The number of trained parameters of a method, and the bytes of its gradients and optimizer state."""

    num_parameters: int
    num_bytes: int


class Stepper:
    """A training method with its model and optimizer."""

    def __init__(self, method: str, model: str | None, rank: int) -> None:
        self.config = FitConfig.model_validate(
            {"data": ["none"], "output": Path("none"), "method": method, "model": model, "rank": rank, "alpha": 2 * rank}
        )
        base = load_base(model, attention=ATTENTION)
        self.method: TrainingMethod = create_method(self.config, base)
        if method == "lori":
            for name, parameter in self.method.base.model.named_parameters():
                if name.endswith(".b.change"):
                    nn.init.normal_(parameter)  # gives a random mask
        self.method.begin_phase(phases_of(self.config)[-1])
        self.model = self.method.base.model.train()
        self.loss_of = CompletionLoss(self.method.adapter_disabled)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)

    def _context(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16) if self.method.is_autocast else nullcontext()

    def step(self, batch: PackedBatch) -> None:
        """Train one step as Trainer does. The gradients stay until the next step."""
        self.optimizer.zero_grad(set_to_none=True)
        with self._context():
            loss = self.loss_of(self.model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()

    @torch.no_grad()
    def loss(self, batch: PackedBatch) -> float:
        """Return the current loss."""
        return self.loss_of(self.model, batch).item()

    def footprint(self) -> Footprint:
        """Return the footprint after a step."""
        states = (t for state in self.optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.dim())
        grads = (p.grad for p in self.parameters if p.grad is not None)
        return Footprint(sum(p.numel() for p in self.parameters), _bytes(states) + _bytes(grads))


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def batches(vocabulary: int, num_tokens: int) -> dict[str, PackedBatch]:
    """Return a batch of short examples and a batch of long ones. Half of each example is predicted."""
    rng = random.Random(0)
    result = {}
    for name, length in (("short", 32), ("long", 256)):
        examples = [
            Example(tuple(rng.randrange(vocabulary) for _ in range(length)), length // 2)
            for _ in range(max(1, num_tokens // length))
        ]
        result[name] = pack(MicroBatch(tuple(examples), 1 / len(examples)))
    return result


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="the embedded model if absent")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1024, help="of a step")
    parser.add_argument("--seconds", type=float, default=120, help="for each batch")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    steppers = {method: Stepper(method, arguments.model, arguments.rank) for method in METHODS}
    print(f"{machine()} {versions()}, {arguments.threads} thread(s), {default_dtype()}")
    rows = []
    for name, batch in batches(steppers["lora"].model.config.vocab_size, arguments.tokens).items():
        times = timed({m: partial(s.step, batch) for m, s in steppers.items()}, arguments.seconds)
        lora = times["lora"]
        for method, time in times.items():
            footprint, lora_footprint = steppers[method].footprint(), steppers["lora"].footprint()
            rows.append(
                [
                    name, method, f"{batch.input_ids.numel() / time.median * 1e6:.0f}",
                    f"{lora.median / time.median:.2f} ({lora.low / time.high:.2f}–{lora.high / time.low:.2f})",
                    f"{footprint.num_parameters:,}", f"{footprint.num_bytes / 2**20:.1f}",
                    f"{footprint.num_bytes / lora_footprint.num_bytes:.1%}",
                ]
            )  # fmt: skip
    columns = ["examples", "method", "tokens/s", "of LoRA's", "trained", "gradients, optimizer, MiB", "of LoRA's"]
    print_table(columns, rows)


if __name__ == "__main__":
    main()
