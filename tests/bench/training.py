"""How fast a training step is, and what it holds in memory: LoRI-S, LoRI-D and PEFT's LoRA on the same batches in turn.

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
from training.batches import Part
from training.config import FitConfig
from training.data import Example
from training.loss import CompletionLoss
from training.methods import TrainingMethod, method_of
from training.packing import ATTENTION, PackedBatch, pack
from training.phase import phases_of

METHODS = ("lora", "lori-d", "lori")


@dataclass(frozen=True, slots=True)
class Held:
    """What a method trains, and what gradients and the optimizer's state take, in bytes."""

    num_parameters: int
    num_bytes: int


class Stepper:
    """One method with its optimizer, ready to train."""

    def __init__(self, method: str, model: str | None, rank: int) -> None:
        self.config = FitConfig.model_validate(
            {"data": ["none"], "output": Path("none"), "method": method, "model": model, "rank": rank, "alpha": 2 * rank}
        )
        base = load_base(model, attention=ATTENTION)
        self.method: TrainingMethod = method_of(self.config, base)
        if method == "lori":
            for name, parameter in self.method.base.model.named_parameters():
                if name.endswith(".b.change"):
                    nn.init.normal_(parameter)  # the mask is any
        self.method.begin(phases_of(self.config)[-1])
        self.model = self.method.base.model.train()
        self.loss_of = CompletionLoss(self.method.base_alone)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)

    def _context(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16) if self.method.is_autocast else nullcontext()

    def step(self, batch: PackedBatch) -> None:
        """Trains one step as Trainer does, and keeps the gradients until the next."""
        self.optimizer.zero_grad(set_to_none=True)
        with self._context():
            loss = self.loss_of(self.model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()

    @torch.no_grad()
    def loss(self, batch: PackedBatch) -> float:
        """Returns the loss as it is now."""
        return self.loss_of(self.model, batch).item()

    def held(self) -> Held:
        """Returns what is held after a step."""
        states = (t for state in self.optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.dim())
        grads = (p.grad for p in self.parameters if p.grad is not None)
        return Held(sum(p.numel() for p in self.parameters), _bytes(states) + _bytes(grads))


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def batches(vocabulary: int, num_tokens: int) -> dict[str, PackedBatch]:
    """Returns one batch of short examples, and one of long ones, half of each predicted."""
    rng = random.Random(0)
    found = {}
    for name, length in (("short", 32), ("long", 256)):
        examples = [
            Example(tuple(rng.randrange(vocabulary) for _ in range(length)), length // 2)
            for _ in range(max(1, num_tokens // length))
        ]
        found[name] = pack(Part(tuple(examples), 1 / len(examples)))
    return found


def main() -> None:
    """Prints the table."""
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
        for method, found in times.items():
            held, against = steppers[method].held(), steppers["lora"].held()
            rows.append(
                [
                    name, method, f"{batch.input_ids.numel() / found.median * 1e6:.0f}",
                    f"{lora.median / found.median:.2f} ({lora.low / found.high:.2f}–{lora.high / found.low:.2f})",
                    f"{held.num_parameters:,}", f"{held.num_bytes / 2**20:.1f}", f"{held.num_bytes / against.num_bytes:.1%}",
                ]
            )  # fmt: skip
    columns = ["examples", "method", "tokens/s", "of LoRA's", "trained", "gradients, optimizer, MiB", "of LoRA's"]
    print_table(columns, rows)


if __name__ == "__main__":
    main()
