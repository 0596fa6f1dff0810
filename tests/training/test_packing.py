"""Batches without padding give what each example gives alone."""

from pathlib import Path

import torch
from torch.nn import functional as F

from lori.base_model import load_base_model
from training.data import Example
from training.loop import completion_loss
from training.packing import ATTENTION


def test_a_packed_loss_is_the_mean_of_the_examples_own_losses(tiny_model: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    examples = [
        Example(tuple(torch.randint(0, 256, (length,), generator=generator).tolist()), num_prompt)
        for length, num_prompt in [(5, 2), (40, 1), (7, 6), (33, 20), (64, 10)]
    ]
    packed = load_base_model(str(tiny_model), torch.float32, attention=ATTENTION).model
    alone = load_base_model(str(tiny_model), torch.float32).model
    losses = []
    for example in examples:
        logits = alone(torch.tensor([example.ids])).logits[0, example.num_prompt - 1 : -1]
        losses.append(F.cross_entropy(logits, torch.tensor(example.ids[example.num_prompt :])))
    torch.testing.assert_close(completion_loss(packed, examples), torch.stack(losses).mean(), rtol=1e-5, atol=1e-5)
