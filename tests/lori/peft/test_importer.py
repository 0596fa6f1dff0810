"""Imports from PEFT's format: an equivalent adapter, or a refusal with every fault."""

import json
import math
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lori.adapter import Adapter
from lori.basis import Explicit
from lori.config import CONFIG_FILE
from lori.errors import AdapterError, AdapterFormatError
from lori.format import WEIGHTS_FILE, load_adapter, save_adapter
from lori.mask import mask_nnz
from lori.peft.importer import Imported, import_peft, module_of
from tests.lori.adapters import BASE, RANK, SHAPES, targeted

Tensors = dict[str, torch.Tensor]
PREFIX = "base_model.model."
Q, UP = "layers.0.q_proj", "layers.1.up_proj"  # (9, 5) and (16, 7)
TARGETED = targeted(SHAPES)
ALPHA = 6.0


def make_tensors(
    density: float = 0.4, prefix: str = PREFIX, infix: str = "", dtype: torch.dtype = torch.float32, ranks: Mapping[str, int] = {}
) -> Tensors:
    """Return random A and B of every targeted module of `BASE`. A fraction `density` of B is nonzero."""
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for module, (num_outputs, num_inputs) in TARGETED.items():
        rank = ranks.get(module, RANK)
        b = torch.randn(num_outputs, rank, generator=g) * (torch.rand(num_outputs, rank, generator=g) < density)
        tensors[f"{prefix}{module}.lora_A{infix}.weight"] = torch.randn(rank, num_inputs, generator=g).to(dtype)
        tensors[f"{prefix}{module}.lora_B{infix}.weight"] = b.to(dtype)
    return tensors


def write(folder: Path, tensors: Tensors, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "base_model_name_or_path": "a/base", "peft_version": "0.21"}
    (folder / CONFIG_FILE).write_text(json.dumps(config | changes))
    save_file(tensors, folder / WEIGHTS_FILE)
    return folder


def load(folder: Path, **options: Any) -> Imported:
    return import_peft(folder, BASE, name="math", **options)


def faults_of(folder: Path) -> tuple[str, ...]:
    with pytest.raises(AdapterFormatError) as caught:
        load(folder)
    assert caught.value.source == str(folder)
    return caught.value.faults


def delta(imported: Imported, module: str) -> torch.Tensor:
    """Return the adapter's delta to the weight of `module`, (D, N) fp64."""
    b, a = matrices(imported, module)
    return imported.adapter.config.scale_of(module) * b @ a


def matrices(imported: Imported, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B (D, R) and A (R, N) of `module`, fp64."""
    b = imported.adapter.modules[module]
    return b.dense(torch.float64), imported.adapter.basis.draw(module, b.shape[1], SHAPES[module][1]).double()


def save_and_load(store: Path, imported: Imported) -> Adapter:
    assert isinstance(imported.adapter.basis, Explicit)
    save_adapter(imported.adapter, store / "math")
    return load_adapter(store / "math", BASE)


def product(tensors: Tensors, module: str, prefix: str = PREFIX, infix: str = "") -> torch.Tensor:
    """Return B A of `module`, (D, N) fp64."""
    a, b = (tensors[f"{prefix}{module}.lora_{part}{infix}.weight"].double() for part in "AB")
    return b @ a


def test_an_import_adds_the_delta_of_the_file(tmp_path: Path) -> None:
    tensors = make_tensors()
    imported = load(write(tmp_path / "a", tensors))
    assert list(imported.adapter.modules) == list(TARGETED)
    for module, b in imported.adapter.modules.items():
        torch.testing.assert_close(delta(imported, module), ALPHA / RANK * product(tensors, module), rtol=0, atol=0)
        assert b.values.ne(0).all()
    assert imported.pruning_error == 0.0
    assert imported.ignored == ()


def test_the_config_records_its_source(tmp_path: Path) -> None:
    config = load(write(tmp_path / "a", make_tensors(density=0.2)), templates=("plain",)).adapter.config
    assert config.lori.training == {"imported": {"from": "a/base", "format": "peft", "peft_version": "0.21"}}
    assert config.target_modules == ("q_proj", "up_proj")
    assert config.lori.base_digest == BASE.digest
    assert config.lori.templates == ("plain",)
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (RANK, ALPHA, {}, {})
    assert 0.6 < config.lori.sparsity < 0.9


def test_modules_of_one_layer_alone_are_named_in_full(tmp_path: Path) -> None:
    tensors = {key: t for key, t in make_tensors().items() if "layers.1" in key}
    assert load(write(tmp_path / "a", tensors)).adapter.config.target_modules == ("layers.1.q_proj", "layers.1.up_proj")


def test_an_import_can_be_saved_and_loaded(tmp_path: Path) -> None:
    imported = load(write(tmp_path / "a", make_tensors()))
    loaded = save_and_load(tmp_path / "store", imported)
    assert loaded.basis == imported.adapter.basis
    for module, b in imported.adapter.modules.items():
        assert torch.equal(loaded.modules[module].indices, b.indices)
        assert torch.equal(loaded.modules[module].values, b.values)


def test_an_import_does_not_depend_on_its_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", make_tensors())
    imported = load(folder)
    before = delta(imported, Q)
    (folder / WEIGHTS_FILE).write_bytes(b"")
    assert torch.equal(delta(imported, Q), before)


@pytest.mark.parametrize("infix", ["", ".default", ".my-task"])
@pytest.mark.parametrize("prefix", ["", PREFIX, PREFIX + PREFIX, "module.", "_orig_mod.", "_orig_mod.module." + PREFIX])
def test_names_are_found_under_every_prefix(tmp_path: Path, prefix: str, infix: str) -> None:
    tensors = make_tensors(prefix=prefix, infix=infix)
    imported = load(write(tmp_path / "a", tensors))
    for module in TARGETED:
        assert torch.equal(delta(imported, module), ALPHA / RANK * product(tensors, module, prefix, infix))


def test_the_longest_matching_suffix_of_a_path_wins() -> None:
    modules = {"layers.0.q": 1, "model.layers.0.q": 1, "model.model.layers.0.q": 1}
    assert module_of("base_model.model.model.layers.0.q", modules) == "model.model.layers.0.q"
    assert module_of("module.model.layers.0.q", modules) == "model.layers.0.q"
    assert module_of("vision.model.layers.0.q", modules) is None
    assert module_of("model.layers.0.qq", modules) is None


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_scales_are_those_that_the_patterns_give(tmp_path: Path, use_rslora: bool) -> None:
    tensors = make_tensors(ranks={Q: 5, UP: 2})
    patterns = {"rank_pattern": {"0.q_proj": 5, "layers.1.up_proj": 2}, "alpha_pattern": {"up_proj": 3.0, "layers.1.*": 50.0}}
    imported = load(write(tmp_path / "a", tensors, use_rslora=use_rslora, **patterns))
    for module in TARGETED:
        rank = {Q: 5, UP: 2}.get(module, RANK)
        alpha = 3.0 if "up_proj" in module else 50.0 if "layers.1" in module else ALPHA
        scale = alpha / math.sqrt(rank) if use_rslora else alpha / rank
        # Scales are compared separately, since the effect of a scale's last bit on a sum of products depends on the CPU.
        assert imported.adapter.config.scale_of(module) == pytest.approx(scale, rel=1e-15, abs=0)
        b, a = matrices(imported, module)
        assert torch.equal(b @ a, product(tensors, module))
    assert imported.adapter.config.rank_pattern == {Q: 5, UP: 2}


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float16"), (torch.float32, "float32")]
)
def test_values_are_stored_as_the_file_has_them(tmp_path: Path, dtype: torch.dtype, expected: str) -> None:
    imported = load(write(tmp_path / "a", make_tensors(dtype=dtype)))
    assert imported.adapter.config.lori.values == expected
    assert all(b.values.dtype == dtype for b in imported.adapter.modules.values())
    assert isinstance(imported.adapter.basis, Explicit)
    assert all(a.dtype == dtype for a in imported.adapter.basis.tensors.values())


def test_values_of_several_dtypes_are_stored_as_fp32(tmp_path: Path) -> None:
    tensors = make_tensors()
    key = f"{PREFIX}{Q}.lora_B.weight"
    assert load(write(tmp_path / "a", tensors | {key: tensors[key].half()})).adapter.config.lori.values == "float32"


def test_the_type_of_the_values_can_be_chosen(tmp_path: Path) -> None:
    assert load(write(tmp_path / "a", make_tensors()), values="int8").adapter.config.lori.values == "int8"


def test_a_dense_b_keeps_everything(tmp_path: Path) -> None:
    adapter = load(write(tmp_path / "a", make_tensors(density=1.1))).adapter
    assert all(b.density == 1.0 for b in adapter.modules.values())
    assert adapter.config.lori.sparsity == 0.0


def test_a_b_of_zeros_alone_keeps_nothing(tmp_path: Path) -> None:
    imported = load(write(tmp_path / "a", make_tensors(density=-1.0)), sparsity=0.5)
    assert imported.adapter.nnz == 0
    assert imported.pruning_error == 0.0
    assert save_and_load(tmp_path / "store", imported).nnz == 0


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("density", [0.6, 1.1])
def test_the_error_of_pruning_is_that_of_the_dense_deltas(tmp_path: Path, sparsity: float, density: float) -> None:
    tensors = make_tensors(density)
    imported = load(write(tmp_path / "a", tensors, alpha_pattern={"up_proj": 20.0}), sparsity=sparsity)
    lost = total = 0.0
    for module in TARGETED:
        exact = (20.0 if "up_proj" in module else ALPHA) / RANK * product(tensors, module)
        lost += float((exact - delta(imported, module)).square().sum())
        total += float(exact.square().sum())
    assert imported.pruning_error == pytest.approx(math.sqrt(lost / total), rel=1e-12)
    assert imported.pruning_error > 0.01
    assert imported.adapter.config.lori.training["imported"]["error"] == imported.pruning_error
    assert imported.adapter.config.lori.training["imported"]["sparsity"] == sparsity
    assert imported.adapter.nnz == mask_nnz(imported.adapter.num_entries, sparsity)


def test_pruning_keeps_no_zero_and_loses_nothing_if_enough_are_zero(tmp_path: Path) -> None:
    imported = load(write(tmp_path / "a", make_tensors(density=0.2)), sparsity=0.3)
    assert all(b.values.ne(0).all() for b in imported.adapter.modules.values())
    assert imported.adapter.nnz < mask_nnz(imported.adapter.num_entries, 0.3)
    assert imported.pruning_error == 0.0


@pytest.mark.parametrize(
    ("edit", "changes"),
    [
        (lambda t: t[f"{PREFIX}{Q}.lora_B.weight"].mul_(1e3), {}),
        (lambda t: t[f"{PREFIX}{Q}.lora_A.weight"].mul_(1e3), {}),
        (len, {"alpha_pattern": {Q: 6e3}}),
    ],
    ids=["B", "A", "alpha"],
)
def test_pruning_keeps_the_entries_that_add_most_to_the_delta(
    tmp_path: Path, edit: Callable[[Tensors], Any], changes: dict[str, Any]
) -> None:
    tensors = make_tensors(density=1.1)
    edit(tensors)
    modules = load(write(tmp_path / "a", tensors, **changes), sparsity=0.8).adapter.modules
    assert modules[Q].density == 1.0
    assert modules[UP].density < 0.3


def test_saved_embeddings_are_ignored_and_named(tmp_path: Path) -> None:
    names = [
        "base_model.model.lm_head.base_layer.weight",
        "base_model.model.lm_head.weight",
        "base_model.model.model.embed_tokens.base_layer.weight",
        "base_model.model.model.embed_tokens.weight",
    ]
    tensors = make_tensors()
    imported = load(write(tmp_path / "a", tensors | {name: torch.full((4, 4), math.nan) for name in names}))
    assert imported.ignored == tuple(names)
    assert torch.equal(delta(imported, Q), ALPHA / RANK * product(tensors, Q))


A_KEY, B_KEY = f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda t: t.pop(B_KEY), f"{Q}: it has no lora_B"),
        (lambda t: t.pop(A_KEY), f"{Q}: it has no lora_A"),
        (lambda t: t.update({A_KEY: torch.ones(3, 6)}), f"{Q}.lora_A: shape is (3, 6), expected (3, 5)"),
        (lambda t: t.update({A_KEY: torch.ones(2, 5)}), f"{Q}.lora_A: shape is (2, 5), expected (3, 5)"),
        (lambda t: t.update({A_KEY: torch.tensor(1.0)}), f"{Q}.lora_A: shape is (), expected (3, 5)"),
        (lambda t: t.update({B_KEY: torch.ones(8, 3)}), f"{Q}.lora_B: shape is (8, 3), expected (9, 3)"),
        (lambda t: t.update({B_KEY: torch.ones(9, 4)}), f"{Q}.lora_B: shape is (9, 4), expected (9, 3)"),
        (lambda t: t.update({B_KEY: torch.ones(9, 3, 1)}), f"{Q}.lora_B: shape is (9, 3, 1), expected (9, 3)"),
        (lambda t: t[A_KEY][0].fill_(math.nan), f"{Q}.lora_A: 5 values are not finite"),
        (lambda t: t[B_KEY][:2, 1].fill_(-math.inf), f"{Q}.lora_B: 2 values are not finite"),
        (lambda t: t.update({B_KEY: t[B_KEY].long()}), f"{Q}.lora_B: torch.int64, expected one of"),
        (lambda t: t.update({B_KEY: t[B_KEY].double()}), f"{Q}.lora_B: torch.float64, expected one of"),
        (lambda t: t.update({A_KEY: t[A_KEY].to(torch.float8_e4m3fn)}), f"{Q}.lora_A: torch.float8_e4m3fn, expected one of"),
        (lambda t: t.update({f"{PREFIX}{Q}.lora_A.b.weight": t[A_KEY].clone()}), f"{A_KEY}: a second lora_A of {Q}"),
        (
            lambda t: t.update({f"{PREFIX}layers.7.q_proj.lora_A.weight": torch.ones(3, 5)}),
            f"{PREFIX}layers.7.q_proj.lora_A.weight: the base has no linear layer called 'base_model.model.layers.7.q_proj'",
        ),
        (
            lambda t: t.update({f"{PREFIX}lm_head.lora_A.weight": torch.ones(3, 5)}),
            f"{PREFIX}lm_head.lora_A.weight: the base has no linear layer called 'base_model.model.lm_head'",
        ),
        (lambda t: t.update({f"{PREFIX}{Q}.lora_magnitude_vector": torch.ones(9)}), f"{PREFIX}{Q}.lora_magnitude_vector: DoRA"),
        (lambda t: t.update({f"{PREFIX}{Q}.lora_B.bias": torch.ones(9)}), f"{PREFIX}{Q}.lora_B.bias: a bias of lora_B"),
        (lambda t: t.update({f"{PREFIX}e.lora_embedding_A": torch.ones(3)}), f"{PREFIX}e.lora_embedding_A: LoRA of embeddings"),
        (lambda t: t.update({f"{PREFIX}s.modules_to_save.w": torch.ones(3)}), f"{PREFIX}s.modules_to_save.w: a module that was"),
        (lambda t: t.update({f"{PREFIX}{Q}.base_layer.weight": torch.ones(9, 5)}), f"{PREFIX}{Q}.base_layer.weight: unknown"),
        (lambda t: t.update({f"{PREFIX}{Q}.bias": torch.ones(9)}), f"{PREFIX}{Q}.bias: unknown tensor"),
    ],
)  # fmt: skip
def test_a_fault_of_a_tensor_is_named(tmp_path: Path, edit: Callable[[Tensors], Any], expected: str) -> None:
    tensors = make_tensors()
    edit(tensors)
    faults = faults_of(write(tmp_path / "a", tensors))
    assert [fault[: len(expected)] for fault in faults] == [expected]


def test_every_fault_of_config_and_tensors_is_found_at_once(tmp_path: Path) -> None:
    tensors = make_tensors()
    del tensors[B_KEY]
    tensors[f"{PREFIX}{UP}.lora_A.weight"][:] = math.nan
    tensors[f"{PREFIX}{UP}.lora_B.weight"] = torch.ones(2, 2)
    faults = "\n".join(faults_of(write(tmp_path / "a", tensors, use_dora=True, bias="all")))
    for part in ("use_dora is True", "bias: ", f"{Q}: it has no lora_B", "21 values are not finite", "(2, 2), expected (16, 3)"):
        assert part in faults


def test_a_rank_that_the_config_does_not_give_is_a_fault(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", make_tensors(), rank_pattern={"layers.0.q_proj": 4})
    assert faults_of(folder) == (
        f"{Q}.lora_A: shape is (3, 5), expected (4, 5)",
        f"{Q}.lora_B: shape is (9, 3), expected (9, 4)",
    )


@pytest.mark.parametrize("tensors", [{}, {"base_model.model.lm_head.weight": torch.ones(2, 2)}], ids=["none", "an embedding"])
def test_a_file_without_lora_is_refused(tmp_path: Path, tensors: Tensors) -> None:
    assert faults_of(write(tmp_path / "a", tensors)) == (f"{WEIGHTS_FILE}: it has no lora_A and no lora_B",)


class Trap:
    """Object whose unpickling creates a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_is_refused_unread_with_a_remedy(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", make_tensors())
    (folder / WEIGHTS_FILE).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    [fault] = faults_of(folder)
    assert "adapter_model.bin" in fault
    assert "safe_serialization=True" in fault
    assert not (tmp_path / "sprung").exists()


def test_missing_weights_are_a_fault(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", make_tensors())
    (folder / WEIGHTS_FILE).unlink()
    assert faults_of(folder) == (f"there is no {WEIGHTS_FILE}",)


def test_a_missing_folder_lacks_both_files(tmp_path: Path) -> None:
    assert len(faults_of(tmp_path / "nowhere")) == 2


def test_a_pipe_is_not_followed(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", make_tensors())
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    assert sorted(faults_of(folder)) == [
        f"{CONFIG_FILE} cannot be read: it is not a regular file",
        f"{WEIGHTS_FILE} is not a regular file",
    ]


@pytest.mark.parametrize("content", [b"", b"text", b"\xff" * 64, pickle.dumps({"a": 1})], ids=["empty", "text", "huge", "pickle"])
def test_weights_that_are_no_safetensors_are_refused(tmp_path: Path, content: bytes) -> None:
    folder = write(tmp_path / "a", make_tensors())
    (folder / WEIGHTS_FILE).write_bytes(content)
    [fault] = faults_of(folder)
    assert fault.startswith(f"{WEIGHTS_FILE} is not a safetensors file: ")


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a", make_tensors()) / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-1])
    [fault] = faults_of(file.parent)
    assert fault.startswith(f"{WEIGHTS_FILE} is not a safetensors file: ")


@pytest.mark.parametrize("sparsity", [1.0, -0.1, math.nan])
def test_an_impossible_sparsity_is_refused(tmp_path: Path, sparsity: float) -> None:
    with pytest.raises(AdapterError, match=r"sparsity is .*, expected 0 <= sparsity < 1"):
        load(write(tmp_path / "a", make_tensors()), sparsity=sparsity)


def test_a_name_that_no_adapter_may_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no adapter's name"):
        import_peft(write(tmp_path / "a", make_tensors()), BASE, name="../math")
