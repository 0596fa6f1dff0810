"""The engine's own attention and batching against transformers' `generate`, on tiny random models of several families."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    Lfm2Config,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from lori.base_model import load_base_model
from lori.errors import ModelError
from server.engine.admission import Ask
from server.loading import load_service
from server.settings import Settings
from tests.server.rig import EOS, Heard, Rig, build, greedy, request
from tests.tiny import save_tiny_model, tiny_llama_config

SIZES: dict[str, Any] = {
    "vocab_size": EOS + 1, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "eos_token_id": EOS, "tie_word_embeddings": False,
}  # fmt: skip

SERVED: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: tiny_llama_config(EOS + 1, tie_word_embeddings=False),
    "llama, all heads their own keys": lambda: tiny_llama_config(EOS + 1, num_key_value_heads=4),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
    "mistral with a window of 8": lambda: MistralConfig(**SIZES, head_dim=16, sliding_window=8),
    "gemma3 with a window of 8 in some layers": lambda: Gemma3TextConfig(
        **SIZES,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gemma2 with caps and a window of 8 in some layers": lambda: Gemma2Config(
        **SIZES | {"tie_word_embeddings": True},
        head_dim=16,
        sliding_window=8,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=8.0,
        query_pre_attn_scalar=24,
        layer_types=["sliding_attention", "full_attention"],
    ),
}
PROMPT_LENGTHS = (1, 2, 7, 8, 9, 15, 16, 17, 33, 70)
"""Below, at and above a window of 8 and a step of 16 tokens."""


def prompt(length: int) -> str:
    return ("The quick brown fox jumps over the lazy dog, and then it sleeps. " * 2)[-length:]


def run(rig: Rig, num_tokens: int) -> list[Heard]:
    """Runs one request of each length, half of them from the start and the others one step after the other."""
    joins = [max(0, place - 5) for place in range(len(PROMPT_LENGTHS))]
    return rig.run([Ask(prompt=prompt(length), max_tokens=num_tokens) for length in PROMPT_LENGTHS], joins)


@pytest.mark.parametrize("name", SERVED)
def test_greedy_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, SERVED[name]())
    rig = build(tmp_path, max_step_tokens=16)
    reference = load_base_model(str(tmp_path), torch.float32).model
    heard = run(rig, 24)
    assert [h.tokens for h in heard] == [greedy(reference, h.sequence.request.prompt_ids, 24) for h in heard]
    assert len({token for h in heard for token in h.tokens}) > 20, "a model that says much the same proves little"


@pytest.mark.parametrize(("max_step_tokens", "block_size"), [(9, 1), (11, 5), (512, 16)])
def test_neither_chunks_nor_blocks_change_the_tokens(tmp_path: Path, max_step_tokens: int, block_size: int) -> None:
    save_tiny_model(tmp_path, tiny_llama_config(EOS + 1, tie_word_embeddings=False))
    heard = run(build(tmp_path, max_step_tokens=max_step_tokens, block_size=block_size), 16)
    reference = load_base_model(str(tmp_path), torch.float32).model
    assert [h.tokens for h in heard] == [greedy(reference, h.sequence.request.prompt_ids, 16) for h in heard]


def test_scarce_memory_changes_the_order_alone(tmp_path: Path) -> None:
    """Blocks are used again and again, by one sequence after the other: no key of an earlier one is seen."""
    save_tiny_model(tmp_path, tiny_llama_config(EOS + 1, tie_word_embeddings=False))
    heard = run(build(tmp_path, num_blocks=24, block_size=4), 16)
    reference = load_base_model(str(tmp_path), torch.float32).model
    assert [h.tokens for h in heard] == [greedy(reference, h.sequence.request.prompt_ids, 16) for h in heard]


def test_a_model_whose_output_is_its_embedding_is_served(tiny_model: Path) -> None:
    rig = build(tiny_model)
    reference = load_base_model(str(tiny_model), torch.float32).model
    heard = run(rig, 12)
    assert [h.tokens for h in heard] == [greedy(reference, h.sequence.request.prompt_ids, 12) for h in heard]


def service_of(folder: Path) -> object:
    return load_service(Settings(model=str(folder), dtype="float32", kv_cache_gib=0.01))


def test_a_model_that_caps_its_attention_scores_is_refused_at_the_start(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, Gemma2Config(**SIZES | {"tie_word_embeddings": True}, head_dim=16, attn_logit_softcapping=5.0))
    with pytest.raises(ModelError, match=r"(?i)gemma2"):
        service_of(tmp_path)


def scored(folder: Path) -> tuple[list[float], list[float]]:
    """Returns the log-probabilities of a text by the engine, and by transformers."""
    text = prompt(30)
    heard = build(folder).run([Ask(prompt=text, max_tokens=0, echo=True, num_logprobs=0)])[0]
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor(heard.sequence.request.prompt_ids)
    with torch.inference_mode():
        expected = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return [one.value for one in heard.logprobs if one.value is not None], expected.tolist()


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(lambda: GraniteConfig(**SIZES, logits_scaling=8.0), id="granite"),
        pytest.param(lambda: CohereConfig(**SIZES, logit_scale=0.0625, bos_token_id=EOS), id="cohere"),
    ],
)
def test_a_model_that_scales_its_logits_has_right_probabilities_or_is_refused(
    tmp_path: Path, config: Callable[[], PreTrainedConfig]
) -> None:
    """The start's check compares directions, and a scale has none: sampling and log-probabilities were off, in silence."""
    save_tiny_model(tmp_path, config())
    try:
        service_of(tmp_path)
    except ModelError:
        return
    found, expected = scored(tmp_path)
    assert found == pytest.approx(expected, abs=1e-3)


def test_a_model_with_memory_beside_attention_is_served_right_or_refused(tmp_path: Path) -> None:
    """A short convolution sees across the requests of a step and forgets between steps; the start's check has one of each."""
    save_tiny_model(tmp_path, Lfm2Config(**SIZES, layer_types=["conv", "full_attention"], bos_token_id=EOS))
    try:
        service_of(tmp_path)
    except ModelError:
        return
    heard = run(build(tmp_path), 12)
    reference = load_base_model(str(tmp_path), torch.float32).model
    assert [h.tokens for h in heard] == [greedy(reference, h.sequence.request.prompt_ids, 12) for h in heard]


def test_a_folder_without_a_model_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load the base model"):
        service_of(tmp_path)


def test_the_logits_are_those_of_the_wanted_positions(tmp_path: Path) -> None:
    """One forward over two sequences, all positions wanted out of order: the rows are the model's own logits."""
    save_tiny_model(tmp_path, tiny_llama_config(EOS + 1))
    rig = build(tmp_path, max_step_tokens=32)
    lengths = (5, 9)
    for length in lengths:
        rig.submit(request(num_prompt=length))
    chunks = rig.scheduler.plan()
    order = [13, 0, 4, 5, 9]
    found = rig.runner.forward(chunks, order)
    reference = load_base_model(str(tmp_path), torch.float32).model
    with torch.inference_mode():
        rows = torch.cat([reference(torch.arange(length)[None]).logits[0] for length in lengths])
    assert torch.allclose(found, rows[order], atol=1e-4)
    assert found.dtype == torch.float32
