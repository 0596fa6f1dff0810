"""Packed batches: their losses and gradients equal those of each example alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import MistralConfig, PreTrainedModel, Qwen2Config, Qwen3NextConfig

from lori.base_model import BaseModel, load_base_model
from lori.basis import Seeded
from lori.errors import ModelError
from tests.tiny import tiny_llama_config
from training import packing
from training.batches import MicroBatch
from training.data import Example, Pair
from training.loss import CompletionLoss, PreferenceLoss
from training.packing import ATTENTION, check_layers, max_example_length, pack
from training.trainable import adapter_disabled, wrap


def some_examples() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    return [
        Example(tuple(torch.randint(0, 256, (length,), generator=generator).tolist()), num_prompt)
        for length, num_prompt in [(5, 2), (40, 1), (7, 6), (33, 20), (64, 10)]
    ]


def completion_loss(model: PreTrainedModel, micro_batch: MicroBatch) -> torch.Tensor:
    return CompletionLoss(lambda: adapter_disabled(model))(model, pack(micro_batch))


@pytest.fixture
def packed(tiny_model: Path) -> BaseModel:
    return load_base_model(str(tiny_model), torch.float32, attention=ATTENTION)


@pytest.mark.parametrize("max_plain", [0, 40, 1000])
def test_a_packed_loss_is_the_mean_of_the_examples_own_losses(
    tiny_model: Path, packed: BaseModel, max_plain: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "MAX_PLAIN", max_plain)
    examples = some_examples()
    unpacked = load_base_model(str(tiny_model), torch.float32).model
    losses = []
    for example in examples:
        logits = unpacked(torch.tensor([example.ids])).logits[0, example.num_prompt - 1 : -1]
        losses.append(F.cross_entropy(logits, torch.tensor(example.ids[example.num_prompt :])))
    packed_loss = completion_loss(packed.model, MicroBatch(tuple(examples), 1 / len(examples)))
    torch.testing.assert_close(packed_loss, torch.stack(losses).mean(), rtol=1e-5, atol=1e-5)


def test_layers_in_which_examples_would_read_each_other_are_refused() -> None:
    check_layers(tiny_llama_config(257))
    recurrent = Qwen3NextConfig(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    with pytest.raises(ModelError, match="layers of the kind linear_attention is not supported"):
        check_layers(recurrent)


def test_an_example_is_as_long_as_a_window_at_most() -> None:
    assert max_example_length(tiny_llama_config(257)) is None
    assert max_example_length(MistralConfig(sliding_window=24)) == 24
    assert max_example_length(Qwen2Config(num_hidden_layers=2, sliding_window=24, use_sliding_window=False)) is None
    sliding = ["sliding_attention", "full_attention"]
    assert (
        max_example_length(Qwen2Config(num_hidden_layers=2, sliding_window=24, use_sliding_window=True, layer_types=sliding))
        == 24
    )


def test_attention_sinks_are_not_left_out_in_silence() -> None:
    q = torch.randn(1, 4, 3, 8)
    with pytest.raises(ModelError, match="attention sinks"):
        packing.packed_attention(torch.nn.Module(), q, q, q, None, groups=(), scaling=1.0, s_aux=torch.zeros(4))


def test_plain_attention_has_the_gradients_of_torch_s_own() -> None:
    torch.manual_seed(0)
    shapes = [(3, 4, 9, 8), (3, 2, 9, 8), (3, 2, 9, 8)]
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
    weights = torch.randn(3, 4, 9, 8)
    results = []
    for attend in (packing._plain_attention, packing._fused_attention):
        out = attend(q, k, v, 0.3)
        results.append((out, *torch.autograd.grad((out * weights).sum(), (q, k, v))))
    torch.testing.assert_close(results[0], results[1])


def test_an_example_that_keeps_the_base_has_the_kl_divergence_as_loss(packed: BaseModel) -> None:
    layers = wrap(packed.model, ["q_proj", "down_proj"], Seeded(), 4, 8.0)
    ce_examples, kl_examples = (tuple(some_examples()[i : i + 2]) for i in (0, 2))
    kl_examples = tuple(Example(e.ids, e.num_prompt, uses_kl=True) for e in kl_examples)

    def loss(*examples: Example) -> torch.Tensor:
        return completion_loss(packed.model, MicroBatch(examples, 1.0))

    assert loss(*kl_examples).item() == pytest.approx(0.0, abs=1e-6)
    for layer in layers.values():
        torch.nn.init.normal_(layer.b.change, std=0.3)
    assert loss(*kl_examples).item() > 0.01
    torch.testing.assert_close(loss(kl_examples[0], *ce_examples, kl_examples[1]), loss(*kl_examples) + loss(*ce_examples))


def test_a_pair_has_the_dpo_loss(tiny_model: Path, packed: BaseModel) -> None:
    """The loss is -log sigmoid(beta (log pi(c)/ref(c) - log pi(r)/ref(r))), for chosen c and rejected r after the same prompt."""
    layers = wrap(packed.model, ["q_proj", "down_proj"], Seeded(), 4, 8.0)
    torch.manual_seed(0)
    pairs = [
        Pair(Example((*prompt, *chosen), len(prompt)), Example((*prompt, *rejected), len(prompt)))
        for prompt, chosen, rejected in [((1, 2, 3), (4, 5), (6,)), ((9,), (8, 7, 6), (5, 4))]
    ]
    loss = PreferenceLoss(lambda: adapter_disabled(packed.model), beta=0.5)
    batch = pack(MicroBatch(tuple(pairs), 0.5))
    assert loss(packed.model, batch).item() == pytest.approx(np.log(2))
    for layer in layers.values():
        torch.nn.init.normal_(layer.b.change, std=0.3)
    base = load_base_model(str(tiny_model), torch.float32)

    def log_probability(model: PreTrainedModel, example: Example) -> torch.Tensor:
        scores = model(torch.tensor([example.ids])).logits[0].log_softmax(-1)
        positions = range(example.num_prompt, len(example))
        return torch.stack([scores[i - 1, example.ids[i]] for i in positions]).sum()

    packed.model.set_attn_implementation("sdpa")
    gains = [
        [log_probability(packed.model, e) - log_probability(base.model, e) for e in (pair.chosen, pair.rejected)]
        for pair in pairs
    ]
    packed.model.set_attn_implementation(ATTENTION)
    expected = torch.stack([-F.logsigmoid(0.5 * (chosen - rejected)) for chosen, rejected in gains]).mean()
    torch.testing.assert_close(loss(packed.model, batch), expected, rtol=1e-4, atol=1e-5)
