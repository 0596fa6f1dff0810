"""The planner's sizes in bytes, compared with real tensors."""

from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

from lori.base_identity import identify_files
from lori.base_model import load_base_model
from lori.basis import Seeded
from lori.errors import ModelError
from lori.packed_adapter import PackedAdapter, PackedReader
from lori.pool import AdapterPool
from lori.projection import quantize
from server.catalog.stores import DEMO_ADAPTERS
from server.engine.model.runner import Runner, bytes_per_token
from server.plan.memory import adapter_sizes, basis_bytes, gib, model_sizes
from server.plan.speed import HELD_FACTOR, RESERVED_FACTOR
from tests.tiny import save_tiny_model, tiny_llama_config

BF16 = torch.bfloat16
DEMO = sorted(folder for folder in DEMO_ADAPTERS.iterdir() if folder.is_dir())


@cache
def demo_adapters() -> tuple[dict[str, tuple[int, int]], dict[str, PackedAdapter]]:
    """Return the shapes of the embedded model's modules, and the demo adapters packed for them."""
    base = identify_files(None)
    reader = PackedReader(base, AdapterPool(base.shapes, [Seeded()], 32, 1, BF16).layouts)
    return base.shapes, {folder.name: reader.read(folder) for folder in DEMO}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tiny(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    folder = save_tiny_model(tmp_path / "model", tiny_llama_config(257, tie_word_embeddings=request.param))
    return folder, load_base_model(str(folder), torch.float32).model


@pytest.mark.slow
@pytest.mark.parametrize("folder", DEMO, ids=lambda folder: folder.name)
def test_a_demo_adapter_takes_the_planned_bytes_or_a_little_less(folder: Path) -> None:
    planned = adapter_sizes(model_sizes(None, BF16).shapes, 32, 0.9, BF16)
    _, packed = demo_adapters()
    assert 0.95 * planned.resident < packed[folder.name].num_bytes <= planned.resident
    on_disk = (folder / "adapter_model.safetensors").stat().st_size
    assert on_disk == pytest.approx(planned.on_disk, rel=0.02)


@pytest.mark.slow
def test_a_full_pool_holds_no_more_than_planned() -> None:
    shapes, packed = demo_adapters()
    planned = adapter_sizes(model_sizes(None, BF16).shapes, 32, 0.9, BF16)
    num = 16 * len(packed)
    pool = AdapterPool(shapes, [Seeded()], 32, num, BF16)
    pool.reserve(int(RESERVED_FACTOR * num * planned.resident))
    for slot, adapter in enumerate([*packed.values()] * 16):
        pool.put(slot, adapter)
    # Modules that have moved have memory of their own; the others share the memory laid out at the start.
    storages = [operands.pool.untyped_storage() for operands in pool.operands_of([*shapes])]
    memory = {storage.data_ptr(): storage.nbytes() for storage in storages if storage}
    assert num * planned.resident < sum(memory.values()) <= HELD_FACTOR * num * planned.resident


def test_the_planned_weights_are_those_of_a_loaded_model_and_its_runner(tiny: tuple[Path, PreTrainedModel]) -> None:
    folder, model = tiny
    sizes = model_sizes(str(folder), torch.float32)
    own = sum(parameter.nbytes for parameter in model.parameters())
    head = model.get_output_embeddings().weight
    is_tied = head is model.get_input_embeddings().weight
    assert sizes.weights == own + head.nbytes * is_tied
    assert sizes.kv_token == bytes_per_token(model)
    pool = AdapterPool(sizes.shapes, [Seeded()], 8, 4, torch.float32)
    runner = Runner(model, pool, num_blocks=3, block_size=16)
    assert runner.num_kv_bytes == 3 * 16 * sizes.kv_token


def test_the_planned_basis_has_the_bytes_that_the_pool_draws(tiny: tuple[Path, PreTrainedModel]) -> None:
    sizes = model_sizes(str(tiny[0]), torch.float32)
    bases = [Seeded(), Seeded(stream=1)]
    pool = AdapterPool(sizes.shapes, bases, 8, 4, torch.float32)
    drawn = sum(a.nbytes for blocks in pool.blocks([*sizes.shapes]) for a in blocks)
    assert basis_bytes(sizes.shapes, 8, torch.float32, num_bases=2) == drawn


def test_int8_halves_the_layers_and_leaves_the_rest(tiny: tuple[Path, PreTrainedModel]) -> None:
    folder, model = tiny
    before, after = (model_sizes(str(folder), BF16, quantization).weights for quantization in (None, "int8"))
    linears = [model.get_submodule(name).weight for name in model_sizes(str(folder), BF16).shapes]
    quantized = sum(weight.nbytes + scale.nbytes for weight, scale in map(quantize, linears))
    assert after == before - sum(weight.numel() * 2 for weight in linears) + quantized


def test_a_large_model_needs_no_weights(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    sizes = model_sizes(str(tmp_path), BF16)
    assert sizes.weights == pytest.approx(2 * 8.03e9, rel=1e-3)
    adapter = adapter_sizes(sizes.shapes, 32, 0.9, BF16)
    assert adapter.dense == pytest.approx(167.8e6, rel=1e-3)
    assert adapter.on_disk == pytest.approx(11.5e6, rel=0.01)  # the figure of docs/format.md, from tests.bench.format


def test_only_the_targets_count() -> None:
    shapes = {"a.q_proj": (32, 48), "a.v_proj": (16, 48), "b.q_proj": (32, 48)}
    some = adapter_sizes(shapes, 8, 0.5, BF16, ["q_proj"])
    assert some == adapter_sizes({name: shapes[name] for name in ("a.q_proj", "b.q_proj")}, 8, 0.5, BF16)
    assert some.num_kept == 2 * 32 * 8 / 2
    with pytest.raises(ModelError, match=r"--targets: the model has no k_proj: known are q_proj, v_proj"):
        adapter_sizes(shapes, 8, 0.5, BF16, ["k_proj"])


def test_without_the_compiled_module_the_bytes_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"a.q_proj": (300, 48)}
    before = adapter_sizes(shapes, 8, 0.9, BF16)
    monkeypatch.setattr("lori.kernels.layout.MODULE", None)
    assert adapter_sizes(shapes, 8, 0.9, BF16) == before


@pytest.mark.parametrize("name", ["/no/such/folder", "no/such-model"])
def test_a_model_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ModelError, match=name):
        model_sizes(name, BF16)


def test_a_model_that_is_not_served_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ModelError, match="'gpt2' are not served"):
        model_sizes(str(tmp_path), BF16)


def test_a_flag_in_gib_is_never_less_than_the_bytes() -> None:
    assert [gib(0), gib(1), gib(2**30), gib(2**30 + 1)] == [0, 0.01, 1, 1.01]
