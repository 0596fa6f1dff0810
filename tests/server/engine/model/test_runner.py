"""The engine's own attention and batching against transformers' `generate`, on tiny random models of several families.

The references attend eagerly: other ways leave out what a family does to its scores.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import (
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
from lori.native import MODULE
from server.engine.generate_request import GenerateRequest
from server.engine.model.native_ops import NativeOps
from server.engine.model.torch_ops import TorchOps
from server.engine.request import Chunk, SamplingParams
from server.engine.request import Sequence as EngineSequence
from server.engine.startup import check_logits, reference_logits
from server.loading import load_service
from server.settings import Settings
from tests.server.rig import EOS, Heard, Rig, build, greedy, request, rig_of
from tests.tiny import save_tiny_model, tiny_llama_config

SIZES: dict[str, Any] = {
    "vocab_size": EOS + 1, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "eos_token_id": EOS, "tie_word_embeddings": False,
}  # fmt: skip

WINDOWED: dict[str, Any] = {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA2: dict[str, Any] = SIZES | WINDOWED | {"query_pre_attn_scalar": 24}


def rope(kind: str, **fields: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **fields}}


SERVED: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: tiny_llama_config(EOS + 1, tie_word_embeddings=False),
    "llama, all heads their own keys": lambda: tiny_llama_config(EOS + 1, num_key_value_heads=4),
    "llama with biases": lambda: tiny_llama_config(EOS + 1, attention_bias=True, mlp_bias=True),
    "llama with heads of 12": lambda: tiny_llama_config(EOS + 1, head_dim=12),
    "llama with tanh": lambda: tiny_llama_config(EOS + 1, hidden_act="gelu_pytorch_tanh"),
    "llama with erf": lambda: tiny_llama_config(EOS + 1, hidden_act="gelu"),
    "llama with scaled RoPE": lambda: tiny_llama_config(EOS + 1, **rope("linear", factor=4.0)),
    "llama with llama3's RoPE": lambda: tiny_llama_config(
        EOS + 1,
        **rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "llama with yarn's RoPE": lambda: tiny_llama_config(EOS + 1, **rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "qwen2": lambda: Qwen2Config(**SIZES | {"hidden_size": 64}),
    "qwen2 with a window of 8 in the second layer": lambda: Qwen2Config(
        **SIZES | {"hidden_size": 64}, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
    "mistral": lambda: MistralConfig(**SIZES, head_dim=16, sliding_window=None),
    "mistral with a window of 8": lambda: MistralConfig(**SIZES, head_dim=16, sliding_window=8),
    "gemma3 with a window of 8 in some layers": lambda: Gemma3TextConfig(**SIZES, **WINDOWED),
    "gemma2 with caps and a window of 8 in some layers": lambda: Gemma2Config(
        **GEMMA2, attn_logit_softcapping=5.0, final_logit_softcapping=8.0
    ),
    "gemma2 without caps": lambda: Gemma2Config(**GEMMA2, attn_logit_softcapping=None, final_logit_softcapping=None),
}
needs_products = pytest.mark.needs("kernels")
NATIVE, TORCH = 16, 5
"""Block sizes that the compiled operations support, and do not support."""
PROMPT_LENGTHS = (1, 2, 7, 8, 9, 15, 16, 17, 33, 70)
"""Below, at and above a window of 8 and a step of 16 tokens."""


def prompt(length: int) -> str:
    return ("The quick brown fox jumps over the lazy dog, and then it sleeps. " * 2)[-length:]


def run(rig: Rig, num_tokens: int) -> list[Heard]:
    """Run one request of each length, half of them from the start and the others one step after the other."""
    joins = [max(0, place - 5) for place in range(len(PROMPT_LENGTHS))]
    return rig.run([GenerateRequest(prompt=prompt(length), max_tokens=num_tokens) for length in PROMPT_LENGTHS], joins)


def reference_of(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_base_model(str(folder), dtype, attention="eager").model


def has_native(name: str, block_size: int) -> bool:
    return MODULE is not None and block_size == NATIVE and name != "llama with heads of 12"


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [NATIVE, TORCH])
@pytest.mark.parametrize("name", SERVED)
def test_greedy_tokens_are_those_of_transformers(name: str, block_size: int, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, SERVED[name]())
    rig = build(tmp_path, max_step_tokens=16, block_size=block_size)
    assert isinstance(rig.runner._ops, NativeOps if has_native(name, block_size) else TorchOps)
    reference = reference_of(tmp_path)
    heard = run(rig, 24)
    assert [h.tokens for h in heard] == [greedy(reference, h.sequence.request.prompt_ids, 24) for h in heard]
    assert len({token for h in heard for token in h.tokens}) > 20, "a model whose output hardly varies proves little"


def paged_logits(rig: Rig, ids: Sequence[int], cuts: Sequence[int], blocks: Sequence[int]) -> torch.Tensor:
    """Return the logits (T, V) of `ids`, computed in a step for each part between `cuts`, with its keys in `blocks`."""
    prompted = replace(request(len(ids)), prompt_ids=tuple(ids))
    sequence = EngineSequence(prompted, blocks=[*blocks], terms=[])
    parts = [rig.runner.forward([Chunk(sequence, i, j)], range(j - i)) for i, j in pairwise(cuts)]
    return torch.cat(parts)


@pytest.mark.parametrize("block_size", [NATIVE, TORCH])
@pytest.mark.parametrize("name", SERVED)
def test_logits_in_bf16_are_as_near_to_the_exact_ones_as_those_of_transformers(
    name: str, block_size: int, tmp_path: Path
) -> None:
    save_tiny_model(tmp_path, SERVED[name]())
    ids = [*range(40, 80)]
    own = reference_of(tmp_path, torch.bfloat16)
    with torch.inference_mode():
        theirs = own(torch.tensor([ids])).logits[0].float()
        exact = own.float()(torch.tensor([ids])).logits[0]  # in fp32, of the weights already rounded to bf16
    rig = build(tmp_path, dtype=torch.bfloat16, block_size=block_size)
    blocks = [*range(-(-len(ids) // block_size))][::-1]
    ours = paged_logits(rig, ids, (0, 13, 14, 15, 37, 38, 39, 40), blocks)
    assert ours.dtype == torch.float32
    error, allowed = ((logits - exact).norm() / exact.norm() for logits in (ours, theirs))
    assert error < 1.25 * allowed + 0.002
    assert error < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("max_step_tokens", "block_size"), [(9, 1), (11, 5), (9, 16), (11, 32), (512, 16)])
def test_neither_chunks_nor_blocks_change_the_tokens(tmp_path: Path, max_step_tokens: int, block_size: int) -> None:
    save_tiny_model(tmp_path, tiny_llama_config(EOS + 1, tie_word_embeddings=False))
    heard = run(build(tmp_path, max_step_tokens=max_step_tokens, block_size=block_size), 16)
    reference = reference_of(tmp_path)
    assert [h.tokens for h in heard] == [greedy(reference, h.sequence.request.prompt_ids, 16) for h in heard]


@pytest.mark.slow
def test_scarce_memory_changes_only_the_order(tmp_path: Path) -> None:
    """Blocks are reused by one sequence after the other: no key of an earlier sequence is read."""
    save_tiny_model(tmp_path, tiny_llama_config(EOS + 1, tie_word_embeddings=False))
    heard = run(build(tmp_path, num_blocks=24, block_size=4), 16)
    reference = reference_of(tmp_path)
    assert [h.tokens for h in heard] == [greedy(reference, h.sequence.request.prompt_ids, 16) for h in heard]


def test_a_model_with_tied_embeddings_is_served(tiny_model: Path) -> None:
    rig = build(tiny_model)
    reference = reference_of(tiny_model)
    heard = run(rig, 12)
    assert [h.tokens for h in heard] == [greedy(reference, h.sequence.request.prompt_ids, 12) for h in heard]


def service_of(folder: Path) -> object:
    return load_service(Settings(model=str(folder), dtype="float32", kv_cache_gib=0.01))


def gemma3(**changes: Any) -> PreTrainedConfig:
    return Gemma3TextConfig(**SIZES | WINDOWED | changes)


REFUSED = {
    "gpt2": (
        lambda: GPT2Config(vocab_size=EOS + 1, n_embd=48, n_layer=2, n_head=4, bos_token_id=EOS, eos_token_id=EOS),
        "models of type 'gpt2' are not served, expected one of llama, ",
    ),
    "granite, which scales its logits": (lambda: GraniteConfig(**SIZES, logits_scaling=8.0), "models of type 'granite'"),
    "cohere, which scales its logits": (
        lambda: CohereConfig(**SIZES, logit_scale=0.0625, bos_token_id=EOS),
        "models of type 'cohere'",
    ),
    "lfm2, which has memory beside attention": (
        lambda: Lfm2Config(**SIZES, layer_types=["conv", "full_attention"], bos_token_id=EOS),
        "models of type 'lfm2'",
    ),
    "RoPE that depends on the length": (
        lambda: tiny_llama_config(EOS + 1, **rope("dynamic", factor=4.0)),
        "rope type 'dynamic', expected one that does not depend on a sequence's length",
    ),
    "RoPE that depends on the length in some layers": (
        lambda: gemma3(
            rope_parameters={
                "full_attention": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        ),
        "rope type 'dynamic'",
    ),
    "longrope": (
        lambda: tiny_llama_config(
            EOS + 1,
            **rope("longrope", factor=4.0, short_factor=[1.0] * 8, long_factor=[2.0] * 8, original_max_position_embeddings=64),
        ),
        "rope type 'longrope'",
    ),
    "an unknown activation": (
        lambda: tiny_llama_config(EOS + 1, hidden_act="relu2"),
        "activation 'relu2', expected one of silu, ",
    ),
    "attention to later tokens": (lambda: gemma3(use_bidirectional_attention=True), "attention to later tokens"),
    "two faults": (
        lambda: gemma3(use_bidirectional_attention=True, hidden_activation="relu"),
        "activation 'relu', expected one of .*; attention to later tokens",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2 with caps and a window of 8 in some layers", "qwen3", "mistral with a window of 8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_family_that_is_served_starts(name: str, dtype: Literal["float32", "bfloat16"], tmp_path: Path) -> None:
    """Regression: Gemma 2 was refused, because transformers supports its capped scores only with eager attention."""
    save_tiny_model(tmp_path, SERVED[name]())
    load_service(Settings(model=str(tmp_path), dtype=dtype, kv_cache_gib=0.01))


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_would_be_served_wrong_is_refused_at_the_start(name: str, tmp_path: Path) -> None:
    make, message = REFUSED[name]
    save_tiny_model(tmp_path, make())
    with pytest.raises(ModelError, match=message):
        service_of(tmp_path)


def test_log_probabilities_of_capped_logits_are_those_of_transformers(tmp_path: Path) -> None:
    """The check at the start compares directions, which no scale changes, so wrong log-probabilities would pass it."""
    save_tiny_model(tmp_path, SERVED["gemma2 with caps and a window of 8 in some layers"]())
    (heard,) = build(tmp_path).run(
        [GenerateRequest(prompt=prompt(30), max_tokens=0, sampling=SamplingParams(echo=True, num_logprobs=0))]
    )
    ids = torch.tensor(heard.sequence.request.prompt_ids)
    with torch.inference_mode():
        rows = reference_of(tmp_path)(ids[None]).logits[0, :-1].log_softmax(-1)
    expected = rows.gather(1, ids[1:, None])[:, 0].tolist()
    assert [one.value for one in heard.logprobs if one.value is not None] == pytest.approx(expected, abs=1e-3)


def test_a_model_whose_logits_differ_from_transformers_is_refused(tmp_path: Path) -> None:
    """The probe at the start compares logits, so it catches whatever the check of the model's family overlooks."""
    save_tiny_model(tmp_path, SERVED["llama"]())
    base = load_base_model(str(tmp_path), torch.float32, attention="eager")
    expected = reference_logits(base.model)
    runner = build(tmp_path, num_blocks=8).runner
    check_logits(runner, base.model, expected, 128, 16)
    for wrong in (expected.roll(1, 0), expected + 0.2 * expected.norm() / expected.numel() ** 0.5, expected * torch.nan):
        with pytest.raises(ModelError, match="other logits than the model itself"):
            check_logits(runner, base.model, wrong, 128, 16)


def test_a_folder_without_a_model_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load the base model"):
        service_of(tmp_path)


def test_the_logits_are_those_of_the_wanted_positions(tmp_path: Path) -> None:
    """One forward over two sequences, with the wanted positions out of order: the rows are the model's own logits."""
    save_tiny_model(tmp_path, tiny_llama_config(EOS + 1))
    rig = build(tmp_path, max_step_tokens=32)
    lengths = (5, 9)
    for length in lengths:
        rig.submit(request(num_prompt=length))
    chunks = rig.scheduler.plan()
    order = [13, 0, 4, 5, 9]
    actual = rig.runner.forward(chunks, order)
    reference = reference_of(tmp_path)
    with torch.inference_mode():
        rows = torch.cat([reference(torch.arange(length)[None]).logits[0] for length in lengths])
    assert torch.allclose(actual, rows[order], atol=1e-4)
    assert actual.dtype == torch.float32


@needs_products
def test_weights_in_int8_give_nearly_the_same_logits(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, SERVED["llama"]())
    ids = [*range(40, 80)]
    exact, quantized = (
        paged_logits(build(tmp_path, dtype=torch.bfloat16, quantization=q), ids, (0, 30, 40), range(3)) for q in (None, "int8")
    )
    difference = ((quantized - exact).norm() / exact.norm()).item()
    assert 1e-4 < difference < 0.05


@needs_products
def test_a_server_on_weights_in_int8_answers(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, SERVED["qwen3"]())
    rig = rig_of(
        load_service(Settings(model=str(folder), dtype="bfloat16", device="cpu", quantization="int8", kv_cache_gib=0.01))
    )
    (heard,) = rig.run([GenerateRequest(prompt="The quick brown fox", max_tokens=5, sampling=SamplingParams(ignore_eos=True))])
    assert len(heard.tokens) == 5


def test_int8_is_refused_where_its_products_are_missing(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, SERVED["llama"]())
    with pytest.raises(ModelError, match=r"no products in int8 .* in torch.float32 on cpu"):
        load_service(Settings(model=str(folder), dtype="float32", device="cpu", quantization="int8"))
