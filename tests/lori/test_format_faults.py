"""Faults of an adapter on disk in its tensors, digests, base and basis: each is named, and all at once."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as save_tensors

from lori.basis import Explicit, Seeded, tensors_digest
from lori.config import CONFIG_FILE
from lori.errors import AdapterFormatError
from lori.format import WEIGHTS_FILE, load_adapter
from lori.identity import BaseIdentity
from lori.sparse import VALUE_TYPES, ValueType
from lori.store.bases import basis_file
from tests.lori.adapters import BASE_DIGEST, RANK, SHAPES, TARGETS, make_config, make_modules, save
from tests.lori.forged import Q, Tensors, effect, faults_of, forge, load, load_if_sound

# --- one fault at a time, signed again so that there is no other fault

NUM_VALUES = make_modules()[Q].values.numel()

TENSOR_FAULTS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "missing mask": (lambda t: t.pop(f"{Q}.mask"), f"{Q}.mask: missing"),
    "missing values": (lambda t: t.pop(f"{Q}.values"), f"{Q}.values: missing"),
    "unknown tensor": (lambda t: t.update({"lora_A": torch.ones(2)}), "lora_A: unknown tensor"),
    "tensor of a layer that is no target": (
        lambda t: t.update({"layers.0.o_proj.mask": torch.zeros(2, dtype=torch.uint8)}),
        "layers.0.o_proj.mask: unknown tensor",
    ),
    "mask too long": (
        lambda t: t.update({f"{Q}.mask": torch.cat([t[f"{Q}.mask"], torch.zeros(1, dtype=torch.uint8)])}),
        f"{Q}: the mask's code holds ",
    ),
    "mask too short": (
        lambda t: t.update({f"{Q}.mask": t[f"{Q}.mask"][:3].clone()}),
        f"{Q}: the mask's code holds ",
    ),
    "mask of two dimensions": (
        lambda t: t.update({f"{Q}.mask": t[f"{Q}.mask"].view(2, 2)}),
        f"{Q}.mask: torch.uint8 of 2 dimensions, expected torch.uint8 of 1",
    ),
    "mask of another dtype": (
        lambda t: t.update({f"{Q}.mask": t[f"{Q}.mask"].view(torch.int8)}),
        f"{Q}.mask: torch.int8 of 1 dimensions, expected torch.uint8 of 1",
    ),
    "values of another dtype": (
        lambda t: t.update({f"{Q}.values": t[f"{Q}.values"].half()}),
        f"{Q}.values: torch.float16 of 1 dimensions, expected torch.bfloat16 of 1",
    ),
    "values of two dimensions": (
        lambda t: t.update({f"{Q}.values": t[f"{Q}.values"][None].clone()}),
        f"{Q}.values: torch.bfloat16 of 2 dimensions, expected torch.bfloat16 of 1",
    ),
    "values of no dimension": (
        lambda t: t.update({f"{Q}.values": t[f"{Q}.values"][0].clone()}),
        f"{Q}.values: torch.bfloat16 of 0 dimensions, expected torch.bfloat16 of 1",
    ),
    "a value too few": (
        lambda t: t.update({f"{Q}.values": t[f"{Q}.values"][1:].clone()}),
        f"{Q}: the mask's code holds ",
    ),
    "NaN": (lambda t: t[f"{Q}.values"][:2].fill_(math.nan), f"{Q}.values: 2 values are not finite"),
    "infinity": (lambda t: t[f"{Q}.values"][:1].fill_(-math.inf), f"{Q}.values: 1 values are not finite"),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_a_single_fault_in_the_tensors_is_reported_alone(folder: Path, fault: str) -> None:
    edit, expected = TENSOR_FAULTS[fault]
    forge(folder, edit)
    (fault,) = faults_of(folder)
    assert fault.startswith(expected)


def test_a_forgery_that_changes_nothing_loads(folder: Path) -> None:
    before = effect(load(folder))
    forge(folder)
    assert effect(load(folder)) == before


def test_another_base_is_refused_and_named(folder: Path) -> None:
    forge(folder, config=lambda raw: raw["lori"].update(base_digest="c" * 64))
    assert faults_of(folder) == (
        "trained on the base a/base (cccccccccccc), expected a/base (bbbbbbbbbbbb): pass --model a/base, "
        "or train or import an adapter for the base that is loaded",
    )  # fmt: skip


@pytest.mark.parametrize("basis", [Seeded(seed=6, stream=1), Seeded(seed=5, stream=0)])
def test_a_basis_that_is_not_the_trained_one_is_refused(folder: Path, basis: Seeded) -> None:
    trained = json.loads((folder / CONFIG_FILE).read_bytes())["lori"]["basis_digest"]
    forge(folder, config=lambda raw: raw["lori"]["basis"].update(seed=basis.seed, stream=basis.stream))
    drawn = make_config(basis=basis).lori.basis_digest
    assert faults_of(folder) == (f"A drawn again has the digest {drawn}, expected {trained}",)


def test_a_wrong_basis_digest_is_refused(folder: Path) -> None:
    trained = json.loads((folder / CONFIG_FILE).read_bytes())["lori"]["basis_digest"]
    forge(folder, config=lambda raw: raw["lori"].update(basis_digest="d" * 64))
    assert faults_of(folder) == (f"A drawn again has the digest {trained}, expected {'d' * 64}",)


@pytest.mark.parametrize(
    "change", [{"lora_alpha": 6.5}, {"lori": {"basis": {"seed": 6}}}, {"lori": {"base_digest": BASE_DIGEST[:-1] + "c"}}]
)
def test_a_field_that_the_digest_covers_cannot_be_edited(folder: Path, change: dict[str, Any]) -> None:
    raw = json.loads((folder / CONFIG_FILE).read_bytes())
    trained = raw["lori"]["content_digest"]
    section = change.pop("lori", {})
    raw["lori"]["basis"].update(section.pop("basis", {}))
    raw["lori"].update(section)
    (folder / CONFIG_FILE).write_text(json.dumps(raw | change))
    assert [f for f in faults_of(folder) if f.startswith("content digest is ") and f.endswith(f", expected {trained}")]


def test_weights_of_another_adapter_are_refused(folder: Path) -> None:
    save(folder.with_name("other"), make_config(), make_modules(seed=1))
    (folder / WEIGHTS_FILE).write_bytes((folder.with_name("other") / WEIGHTS_FILE).read_bytes())
    (fault,) = faults_of(folder)
    assert fault.startswith("content digest is ")


def test_another_rank_is_refused(folder: Path) -> None:
    forge(folder, config=lambda raw: raw.update(r=4000))
    assert f"{Q}: the mask's code holds " in " ".join(faults_of(folder))


def test_a_target_that_the_base_lacks_is_refused(folder: Path) -> None:
    # Regression: the adapter was loaded, and the part for the missing target silently had no effect.
    forge(folder, config=lambda raw: raw.update(target_modules=[*TARGETS, "gate_proj"]))
    assert any("gate_proj" in fault for fault in faults_of(folder))


def test_a_layer_that_the_base_lacks_is_an_unknown_tensor(folder: Path) -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if name != Q}
    with pytest.raises(AdapterFormatError) as caught:
        load_adapter(folder, BaseIdentity("a/base", BASE_DIGEST, shapes))
    assert caught.value.faults[:2] == (f"{Q}.mask: unknown tensor", f"{Q}.values: unknown tensor")


@pytest.mark.parametrize(
    ("a", "expected"),
    [
        (torch.zeros(RANK, 4), f"{Q}: its A has 4 inputs, expected 5"),
        (torch.zeros(RANK, 1), f"{Q}: its A has 1 inputs, expected 5"),
        (torch.zeros(RANK, 5).to(torch.float8_e4m3fn), f"{Q}: not a matrix of finite floats"),
        (torch.full((RANK, 5), math.nan), f"{Q}: not a matrix of finite floats"),
        (torch.zeros(RANK, 5, 1), f"{Q}: not a matrix of finite floats"),
    ],
)
def test_an_explicit_basis_that_does_not_fit_is_refused(tmp_path: Path, a: torch.Tensor, expected: str) -> None:
    # Regression: each raised an unhandled error, and the store's other adapters were not checked.
    shapes = {Q: (9, 5)}
    drawn = Explicit.from_tensors({Q: Seeded(5, 1).draw(Q, RANK, 5)})
    save(tmp_path / "a", make_config(shapes, ("q_proj",)), make_modules(shapes, ("q_proj",)), drawn)
    digest = tensors_digest({Q: a}) if a.dim() == 2 else "d" * 64
    forge(tmp_path / "a", config=lambda raw: raw["lori"]["basis"].update(digest=digest))
    basis_file(tmp_path, digest).write_bytes(save_tensors({Q: a}))
    assert expected in " ".join(load_faults(tmp_path / "a"))


def load_faults(folder: Path) -> tuple[str, ...]:
    with pytest.raises(AdapterFormatError) as caught:
        load_adapter(folder)
    return caught.value.faults


# --- many faults at a time


def break_everything(t: Tensors) -> None:
    t.pop("layers.0.q_proj.mask")
    t["layers.9.q_proj.mask"] = torch.zeros(4, dtype=torch.uint8)
    t["layers.0.up_proj.mask"] = torch.zeros(9, dtype=torch.int8)
    t["layers.0.up_proj.values"] = t["layers.0.up_proj.values"].float()
    t["layers.1.q_proj.values"] = t["layers.1.q_proj.values"][:-1].clone()
    t["layers.1.up_proj.values"][0] = math.nan


def test_every_fault_is_listed_at_once(folder: Path) -> None:
    forge(folder, break_everything, lambda raw: raw["lori"].update(base_digest="c" * 64))
    raw = json.loads((folder / CONFIG_FILE).read_bytes())
    raw["lora_alpha"] = 7.0
    (folder / CONFIG_FILE).write_text(json.dumps(raw))
    faults = faults_of(folder)
    expected = [
        "content digest is ",
        "trained on the base a/base (cccccccccccc)",
        "layers.0.q_proj.mask: missing",
        "layers.9.q_proj.mask: unknown tensor",
        f"{CONFIG_FILE}: its digest is ",
        "layers.0.up_proj.mask: torch.int8 of 1 dimensions",
        "layers.0.up_proj.values: torch.float32 of 1 dimensions",
        "layers.1.q_proj: the mask's ",
        "layers.1.up_proj.values: 1 values are not finite",
    ]
    assert len(faults) == len(expected)
    assert all(any(fault.startswith(start) for fault in faults) for start in expected)


def test_a_wrong_basis_is_listed_beside_another_fault(folder: Path) -> None:
    # Regression: the wrong basis was not reported beside any other fault, only after that fault was corrected.
    forge(folder, TENSOR_FAULTS["NaN"][0], lambda raw: raw["lori"].update(basis_digest="d" * 64))
    faults = faults_of(folder)
    assert TENSOR_FAULTS["NaN"][1] in faults
    assert any(fault.startswith("A drawn again has the digest ") for fault in faults)


def test_every_fault_of_a_config_is_listed_at_once(folder: Path) -> None:
    raw = json.loads((folder / CONFIG_FILE).read_bytes())
    raw.update(r=0, colour="red")
    raw["lori"].update(sparsity=2.0, base_digest="b")
    (folder / CONFIG_FILE).write_text(json.dumps(raw))
    faults = faults_of(folder)
    fields = ["r", "lori.base_digest", "lori.sparsity", "colour"]
    assert sorted(fault.split(": ")[1] for fault in faults) == sorted(fields)
    assert all(fault.startswith(f"{CONFIG_FILE}: ") for fault in faults)


def test_a_missing_file_hides_no_other_fault(folder: Path) -> None:
    # Regression: a changed config was reported only after the missing weights were back.
    raw = json.loads((folder / CONFIG_FILE).read_bytes())
    (folder / CONFIG_FILE).write_text(json.dumps(raw | {"lora_alpha": 99.0}))
    (folder / WEIGHTS_FILE).unlink()
    first, second = faults_of(folder)
    assert first == f"{WEIGHTS_FILE} cannot be read: No such file or directory"
    assert second.startswith(f"{CONFIG_FILE}: its digest is ")


# --- how the values are stored


@pytest.mark.parametrize("values", VALUE_TYPES)
def test_values_of_another_type_than_the_config_says_are_refused(folder: Path, values: ValueType) -> None:
    if values == "bfloat16":
        assert load_if_sound(folder)
        return
    forge(folder, config=lambda raw: raw["lori"].update(values=values))
    faults = faults_of(folder)
    assert (f"{Q}.scales: missing" if values == "int8" else f"{Q}.values: torch.bfloat16 of 1 dimensions") in " ".join(faults)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda t: t.pop(f"{Q}.scales"), f"{Q}.scales: missing"),
        (lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"][1:].clone()}), f"{Q}.scales: 8 of them, expected 9"),
        (lambda t: t.update({f"{Q}.scales": t[f"{Q}.scales"].float()}), f"{Q}.scales: torch.float32 of 1 dimensions"),
        (lambda t: t[f"{Q}.scales"].mul_(math.inf).nan_to_num_(0.0, math.inf), f"{Q}.values: "),
        # Regression: it was read, and saving it again gave another adapter.
        (lambda t: t[f"{Q}.values"].fill_(3), f"{Q}.scales: not those of its values"),
        (lambda t: t[f"{Q}.scales"].neg_(), f"{Q}.scales: not those of its values"),
    ],
)
def test_wrong_scales_are_refused(tmp_path: Path, edit: Callable[[Tensors], Any], expected: str) -> None:
    save(tmp_path / "a", make_config(values="int8"), make_modules())
    forge(tmp_path / "a", edit)
    (fault,) = faults_of(tmp_path / "a")
    assert fault.startswith(expected)


# --- without a base


def test_without_a_base_a_changed_file_is_refused_and_nothing_is_drawn(folder: Path) -> None:
    raw = json.loads((folder / CONFIG_FILE).read_bytes())
    raw["lori"]["shapes"]["q_proj"] = [9, 2**24]
    (folder / CONFIG_FILE).write_text(json.dumps(raw))
    with pytest.raises(AdapterFormatError) as caught:
        load_adapter(folder)
    assert [fault.split(" is ")[0] for fault in caught.value.faults] == [f"{CONFIG_FILE}: its digest", "content digest"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"q_proj": [8, 5]}, f"{Q}: lori.shapes has (8, 5), expected (9, 5)"),
        ({"q_proj": [9, 6]}, f"{Q}: lori.shapes has (9, 6), expected (9, 5)"),
        ({"layers.1.q_proj": [9, 4]}, "layers.1.q_proj: lori.shapes has (9, 4), expected (9, 5)"),
    ],
)
def test_shapes_that_are_not_the_base_s_are_refused(folder: Path, change: dict[str, Any], expected: str) -> None:
    forge(folder, config=lambda raw: raw["lori"]["shapes"].update(change))
    assert expected in faults_of(folder)


def test_a_module_without_a_shape_is_refused(folder: Path) -> None:
    forge(folder, config=lambda raw: raw["lori"]["shapes"].pop("q_proj"))
    assert f"{Q}: lori.shapes has nothing for it" in faults_of(folder)


def test_a_module_that_is_no_target_is_refused_without_a_base_too(folder: Path) -> None:
    forge(folder, config=lambda raw: raw.update(target_modules=["up_proj"]))
    with pytest.raises(AdapterFormatError, match=r"layers\.0\.q_proj: not among target_modules"):
        load_adapter(folder)


@pytest.mark.parametrize("field", ["sparsity", "metrics", "training", "merge_weights"])
def test_a_record_that_was_edited_is_refused(folder: Path, field: str) -> None:
    raw = json.loads((folder / CONFIG_FILE).read_bytes())
    raw["lori"][field] = {"sparsity": 0.5, "merge_weights": {"x": [1, 1]}}.get(field, {"loss": 0.5})
    (folder / CONFIG_FILE).write_text(json.dumps(raw))
    (fault,) = faults_of(folder)
    assert fault.startswith(f"{CONFIG_FILE}: its digest is ")
