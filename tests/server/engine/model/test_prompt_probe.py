"""The prompt probe against transformers, and its independence of the batch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from lori.base_model import load_base_model
from lori.prompt_statistics import NUM_FEATURES, ProbedPrompt, probed_prompt
from server.engine.model.prompt_probe import MAX_PROMPTS, MAX_TOKENS, PromptProbe
from tests.server.engine.model.test_runner import SERVED
from tests.server.rig import EOS, Rig, build
from tests.tiny import save_tiny_model, tiny_llama_config
from training.prompt_features import prompt_features

PROMPTS = ["My card?", "x", "", "What is 2 + 3?" * 20, "def f(x):\n    return x", "Straße, 東京"]


def probe_of(rig: Rig, dtype: torch.dtype) -> PromptProbe:
    return PromptProbe(rig.runner.decoder, dtype, torch.device("cpu"))


def probed(rig: Rig, prompts: Sequence[str]) -> list[ProbedPrompt]:
    return [probed_prompt(rig.tokenizer, prompt) for prompt in prompts]


@pytest.mark.parametrize("family", SERVED)
def test_features_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    folder = save_tiny_model(tmp_path / "model", SERVED[family]())
    expected = prompt_features(load_base_model(str(folder), torch.float32, "eager"), PROMPTS)
    rig = build(folder)
    features = probe_of(rig, torch.float32).features(probed(rig, PROMPTS))
    assert np.stack(features).shape == (len(PROMPTS), NUM_FEATURES)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)


def test_a_base_of_one_layer_is_probed_whole(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", tiny_llama_config(EOS + 1, num_hidden_layers=1))
    expected = prompt_features(load_base_model(str(folder), torch.float32, "eager"), PROMPTS)
    rig = build(folder)
    np.testing.assert_allclose(probe_of(rig, torch.float32).features(probed(rig, PROMPTS)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block_size", [16, 64])
def test_features_do_not_depend_on_the_batch(tmp_path: Path, block_size: int) -> None:
    # Widths that the compiled operations support.
    rig = build(save_tiny_model(tmp_path / "model", SERVED["qwen3"]()), dtype=torch.bfloat16, block_size=block_size)
    probe, prompts = probe_of(rig, torch.bfloat16), probed(rig, PROMPTS)
    together, backwards = probe.features(prompts), probe.features(prompts[::-1])[::-1]
    for prompt, first, second in zip(prompts, together, backwards, strict=True):
        [alone] = probe.features([prompt])
        np.testing.assert_array_equal(first, alone)
        np.testing.assert_array_equal(second, alone)


def of_length(length: int) -> ProbedPrompt:
    return ProbedPrompt((65,) * length, 0, length)


@pytest.mark.parametrize("lengths", [[MAX_TOKENS], [1] * MAX_PROMPTS, [17] * 60, [2] * 63 + [MAX_TOKENS - 126]])
def test_a_pass_holds_its_tokens_and_prompts(tmp_path: Path, lengths: Sequence[int]) -> None:
    probe = probe_of(build(save_tiny_model(tmp_path / "model")), torch.float32)
    assert np.isfinite(probe.features([of_length(length) for length in lengths])).all()


@pytest.mark.parametrize("lengths", [[MAX_TOKENS, 1], [1] * (MAX_PROMPTS + 1)])
def test_a_pass_holds_no_more(tmp_path: Path, lengths: Sequence[int]) -> None:
    probe = probe_of(build(save_tiny_model(tmp_path / "model")), torch.float32)
    with pytest.raises(AssertionError):
        probe.features([of_length(length) for length in lengths])


def test_the_memory_has_a_fifth_of_the_layers(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", tiny_llama_config(EOS + 1, num_hidden_layers=10))
    rig = build(folder, num_blocks=128, block_size=16)  # 2048 tokens, too
    assert probe_of(rig, torch.float32).num_bytes == rig.runner.num_kv_bytes / 5
