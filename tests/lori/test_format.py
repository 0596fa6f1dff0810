"""An adapter on disk: writing and reading restore it, and an unsound one is refused with every fault."""

import json
import math
import pickle
import random
import resource
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from lori.adapter import Adapter
from lori.basis import Explicit, Seeded, tensors_digest
from lori.config import CONFIG_FILE, AdapterConfig, config_digest
from lori.errors import AdapterError, AdapterFormatError
from lori.format import (
    WEIGHTS_FILE,
    content_digest,
    load_adapter,
    read_config,
    save_adapter,
    write_record,
)
from lori.identity import BaseIdentity
from lori.sparse import VALUE_TYPES, SparseB, ValueType
from lori.store.bases import basis_file
from lori.weights import weight_bytes
from tests.lori.adapters import BASE, BASE_DIGEST, RANK, SHAPES, TARGETS, make_adapter, make_config, make_modules, save

Tensors = dict[str, torch.Tensor]
Q = "layers.0.q_proj"  # (9, 5) at rank 3, 27 entries: its mask, a bitmap at this density, has 4 bytes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a sound adapter called math."""
    return save(tmp_path / "math", make_config(metrics={"loss": 1.25}), make_modules()) and tmp_path / "math"


def load(folder: Path) -> Adapter:
    return load_adapter(folder, BASE)


def load_if_sound(folder: Path) -> Adapter | None:
    """Return the adapter, or `None` if it is refused. Any other error fails the test."""
    try:
        return load(folder)
    except AdapterFormatError:
        return None


def faults_of(folder: Path) -> tuple[str, ...]:
    with pytest.raises(AdapterFormatError) as caught:
        load(folder)
    assert caught.value.source == str(folder)
    return caught.value.faults


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def forge(
    folder: Path, edit: Callable[[Tensors], Any] | None = None, config: Callable[[dict[str, Any]], Any] | None = None
) -> None:
    """Change tensors and config of an adapter in place and give it matching digests, as a forger would."""
    tensors, raw = load_tensors((folder / WEIGHTS_FILE).read_bytes()), json.loads((folder / CONFIG_FILE).read_bytes())
    if edit:
        edit(tensors)
    weights = save_tensors(tensors)
    (folder / WEIGHTS_FILE).write_bytes(weights)
    if config:
        config(raw)
    sign(folder, raw)


def sign(folder: Path, raw: dict[str, Any]) -> None:
    """Give a changed adapter the digests with which it would have been saved."""
    raw["lori"]["content_digest"] = "0" * 64
    config = AdapterConfig.model_validate_json(json.dumps(raw))
    raw["lori"]["content_digest"] = content_digest((folder / WEIGHTS_FILE).read_bytes(), config)
    sign_config(folder, raw)


def sign_config(folder: Path, raw: dict[str, Any]) -> None:
    """Give a changed config the digest of its new content."""
    raw["lori"]["config_digest"] = config_digest(json.dumps(raw).encode())
    (folder / CONFIG_FILE).write_text(json.dumps(raw))


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Context manager: every write of this process beyond `num_bytes` of a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def effect(adapter: Adapter) -> tuple[object, ...]:
    """Return everything that determines an adapter's effect, in a comparable form."""
    modules = {name: (b.mask.tolist(), b.values.tolist()) for name, b in adapter.modules.items()}
    return modules, adapter.version, adapter.basis, adapter.config.r, adapter.config.scale, adapter.config.lori.templates


# --- saving and loading


def test_save_load_save_gives_identical_bytes(tmp_path: Path) -> None:
    config = make_config(alpha=0.1 + 0.2, templates=("plain", "chat"), training={"note": "é", "steps": 3})
    save(tmp_path / "a", config, make_modules())
    loaded = load(tmp_path / "a")
    save_adapter(loaded, tmp_path / "b")
    assert set(content(tmp_path / "a")) == {CONFIG_FILE, WEIGHTS_FILE}
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_bytes_do_not_depend_on_the_order_of_modules() -> None:
    modules = make_modules()
    assert weight_bytes(modules, "int8") == weight_bytes(dict(reversed(modules.items())), "int8")


def test_save_returns_what_load_reads(tmp_path: Path) -> None:
    saved = save(tmp_path / "math", make_config(), make_modules())
    loaded = load(tmp_path / "math")
    assert saved.name == loaded.name == "math"
    assert saved.config == loaded.config
    assert effect(saved) == effect(loaded)
    assert all(b.values.dtype == torch.bfloat16 for a in (saved, loaded) for b in a.modules.values())


def test_values_are_rounded_to_the_nearest_bf16_and_masks_are_kept(tmp_path: Path) -> None:
    modules = make_modules()
    name = "layers.0.q_proj"
    halfway = torch.tensor(
        [1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 1 + 2**-8 + 2**-20, 1e-39, 0.0]
    )  # bf16 has 7 bits of fraction
    modules[name] = SparseB((9, RANK), torch.arange(len(halfway), dtype=torch.int32), halfway)
    save(tmp_path / "a", make_config(), modules)
    loaded = load(tmp_path / "a").modules
    expected = [1.0, 1 + 2**-6, -1.0, 1 + 2**-7]  # ties to even
    assert loaded[name].values.tolist()[:4] == expected
    for module, b in modules.items():
        assert torch.equal(loaded[module].mask, b.mask)
        torch.testing.assert_close(loaded[module].values.float(), b.values, rtol=2**-8, atol=1e-40)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_an_empty_or_full_module_comes_back(tmp_path: Path, density: float) -> None:
    modules = make_modules() | {"layers.1.q_proj": make_modules(density=density)["layers.1.q_proj"]}
    saved = save(tmp_path / "a", make_config(), modules)
    assert effect(load(tmp_path / "a")) == effect(saved)


def test_modules_come_in_the_base_model_s_order(folder: Path) -> None:
    assert list(load(folder).modules) == [name for name in SHAPES if not name.endswith("o_proj")]


def test_a_folder_is_made_with_its_parents_and_is_readable_for_all(tmp_path: Path) -> None:
    save(tmp_path / "some" / "where" / "math", make_config(), make_modules())
    assert load(tmp_path / "some" / "where" / "math").name == "math"
    assert stat.S_IMODE((tmp_path / "some" / "where" / "math").stat().st_mode) == 0o755


@pytest.mark.parametrize(
    ("config", "value", "module"),
    [
        # Regression: each was saved silently and then refused by load, so a training run's result was lost.
        pytest.param({}, math.nan, Q, id="a value that is not a number"),
        pytest.param({}, 3.4e38, Q, id="a value that bf16 rounds to infinity"),
    ],
)
def test_save_refuses_values_that_load_would_refuse(tmp_path: Path, config: dict[str, Any], value: float, module: str) -> None:
    modules = make_modules()
    modules[Q].values[0] = value
    with pytest.raises(AdapterFormatError) as caught:
        save(tmp_path / "a", make_config(**config), modules)
    assert len(caught.value.faults) == 1
    assert module in caught.value.faults[0]
    assert list(tmp_path.iterdir()) == []


# --- versions


@pytest.mark.parametrize(
    ("config", "seed"),
    [
        pytest.param({}, 1, id="content"),
        pytest.param({"alpha": 6.5}, 0, id="alpha"),
        pytest.param({"basis": Seeded(seed=6, stream=1)}, 0, id="seed"),
        pytest.param({"basis": Seeded(seed=5, stream=2)}, 0, id="stream"),
        pytest.param({"base_digest": "c" * 64}, 0, id="base"),
        # Another template writes the same prompt differently.
        pytest.param({"templates": ("plain",)}, 0, id="template"),
    ],
)
def test_a_version_changes_with_what_the_adapter_does(folder: Path, config: dict[str, Any], seed: int) -> None:
    other = save(folder.with_name("other"), make_config(**config), make_modules(seed=seed))
    assert other.version != load(folder).version


def test_a_version_changes_with_one_bit_of_one_value(folder: Path) -> None:
    modules = make_modules()
    modules["layers.0.q_proj"].values[0] *= 1 + 2**-6
    assert save(folder.with_name("other"), make_config(), modules).version != load(folder).version


def test_a_version_is_not_changed_by_names_and_records(folder: Path) -> None:
    config = make_config(metrics={"loss": 3.0}, training={"seconds": 9}, merge_weights={"x": (1.0, 0.5)})
    other = save(folder.with_name("other"), config, make_modules())
    assert other.version == load(folder).version


# --- saving over


def test_saving_over_a_folder_replaces_all_of_it_and_leaves_nothing_else(folder: Path) -> None:
    (folder / "left-over.txt").write_text("x")
    saved = save(folder, make_config(alpha=2.0), make_modules(seed=1))
    assert effect(load(folder)) == effect(saved)
    assert set(content(folder)) == {CONFIG_FILE, WEIGHTS_FILE}
    assert [path.name for path in folder.parent.iterdir()] == ["math"]


def test_a_save_that_fails_leaves_the_old_adapter_and_nothing_else(folder: Path) -> None:
    before = content(folder)
    with pytest.raises(ValueError, match="serialize"):
        save(folder, make_config(alpha=2.0, training={"what": object()}), make_modules(seed=1))
    assert content(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["math"]


def test_a_disk_that_is_full_leaves_the_old_adapter_and_nothing_else(folder: Path) -> None:
    before = content(folder)
    with file_size_limit(len(before[WEIGHTS_FILE])), pytest.raises(OSError, match="File too large"):
        # The weights fit on the disk. The config, which is written after them, does not.
        save(folder, make_config(alpha=2.0, training={"note": "x" * 4096}), make_modules())
    assert content(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["math"]


def test_saving_over_a_link_replaces_the_link(folder: Path) -> None:
    # Regression: an OSError was raised after the new adapter was in place, and the old link was left beside it.
    link = folder.with_name("linked")
    link.symlink_to(folder, target_is_directory=True)
    saved = save(link, make_config(alpha=2.0), make_modules(seed=1))
    assert effect(load(link)) == effect(saved)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["linked", "math"]


# --- figures that are recorded later


def test_a_written_config_and_card_replace_the_old_and_leave_the_rest(folder: Path) -> None:
    before, saved = content(folder), load(folder)
    config = saved.config.model_copy(update={"lori": saved.config.lori.model_copy(update={"metrics": {"loss": 0.5}})})
    for card in ("# Long, but the first\n", "# Ä\n"):
        write_record(folder, config, card)
    assert set(content(folder)) == {CONFIG_FILE, WEIGHTS_FILE, "README.md"}
    assert content(folder)["README.md"].decode() == "# Ä\n"
    assert content(folder)[WEIGHTS_FILE] == before[WEIGHTS_FILE]
    assert load(folder).config.lori.metrics == {"loss": 0.5}
    assert load(folder).config.lori.content_digest == saved.config.lori.content_digest
    assert effect(load(folder)) == effect(saved)


def test_a_metric_that_is_not_a_number_does_not_spoil_a_saved_adapter(folder: Path) -> None:
    # Regression: it was written as null, which is no float, so the adapter could not be loaded any more.
    saved = load(folder)
    before = content(folder)
    section = saved.config.lori.model_copy(update={"metrics": {"loss": math.nan}})
    with pytest.raises(AdapterFormatError, match=r"lori\.metrics\.loss"):
        write_record(folder, saved.config.model_copy(update={"lori": section}), "# math\n")
    assert content(folder) == before


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


# --- files that are not what they should be


def test_a_missing_folder(tmp_path: Path) -> None:
    assert faults_of(tmp_path / "none") == tuple(
        f"{f} cannot be read: No such file or directory" for f in (CONFIG_FILE, WEIGHTS_FILE)
    )


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file(folder: Path, file: str) -> None:
    (folder / file).unlink()
    assert faults_of(folder) == (f"{file} cannot be read: No such file or directory",)


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_folder_in_place_of_a_file(folder: Path, file: str) -> None:
    (folder / file).unlink()
    (folder / file).mkdir()
    assert faults_of(folder) == (f"{file} cannot be read: it is not a regular file",)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"r": ' + b"9" * 5000 + b"}", b'{"base_model_name_or_path": "\\ud800"}'],
    ids=["empty", "cut", "not UTF-8", "deep", "huge number", "half a surrogate"],
)
def test_a_config_that_is_not_json(folder: Path, text: bytes) -> None:
    (folder / CONFIG_FILE).write_bytes(text)
    (fault,) = faults_of(folder)
    assert fault.startswith(f"{CONFIG_FILE}: JSON: Invalid JSON")


def test_a_config_that_is_no_object(folder: Path) -> None:
    (folder / CONFIG_FILE).write_text("[]")
    assert len(faults_of(folder)) == 1


def test_a_peft_lora_adapter_is_refused_as_a_config(folder: Path) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "a/base", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    [fault] = faults_of(folder)
    assert fault.startswith(f"{CONFIG_FILE}: it is a PEFT LoRA: `python -m lori import FOLDER STORE --model a/base` ")


def test_read_config_reads_the_config_alone(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    assert read_config(folder).lori.metrics == {"loss": 1.25}


class Payload:
    """Object whose unpickling creates a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("name", [WEIGHTS_FILE, "adapter_model.bin"])
def test_a_pickle_is_refused_and_not_run(folder: Path, name: str) -> None:
    (folder / WEIGHTS_FILE).unlink()
    (folder / name).write_bytes(pickle.dumps(Payload(folder / "trace")))
    (fault,) = faults_of(folder)
    assert fault.startswith(WEIGHTS_FILE)
    assert not (folder / "trace").exists()
    pickle.loads((folder / name).read_bytes())  # noqa: S301 - shows that the payload would have worked
    assert (folder / "trace").exists()


def test_a_torch_file_is_refused(folder: Path) -> None:
    torch.save(load_tensors((folder / WEIGHTS_FILE).read_bytes()), folder / WEIGHTS_FILE)
    (fault,) = faults_of(folder)
    assert fault.startswith(f"{WEIGHTS_FILE} is not a safetensors file: ")


def test_truncated_weights(folder: Path) -> None:
    whole = (folder / WEIGHTS_FILE).read_bytes()
    for length in [*range(0, len(whole), 11), len(whole) - 1]:
        (folder / WEIGHTS_FILE).write_bytes(whole[:length])
        (fault,) = faults_of(folder)
        assert fault.startswith(f"{WEIGHTS_FILE} is not a safetensors file: "), length


def test_weights_with_trailing_bytes(folder: Path) -> None:
    (folder / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes() + b"\0" * 8)
    assert len(faults_of(folder)) == 1


def test_a_truncated_config(folder: Path) -> None:
    whole = (folder / CONFIG_FILE).read_bytes().rstrip()
    for length in range(0, len(whole), 7):
        (folder / CONFIG_FILE).write_bytes(whole[:length])
        (fault,) = faults_of(folder)
        assert fault.startswith(f"{CONFIG_FILE}: JSON: Invalid JSON"), length


@pytest.mark.parametrize(
    "tensor",
    [
        # Each passes safetensors' own parser. Regression: the conversion to torch raised a KeyError, RuntimeError or TypeError.
        pytest.param({"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}, id="4-bit floats"),
        pytest.param({"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}, id="exponents"),
        pytest.param({"dtype": "U8", "shape": [0, 2**63 - 1, 4], "data_offsets": [0, 0]}, id="strides overflow"),
        pytest.param({"dtype": "U8", "shape": [0, 2**64 - 1], "data_offsets": [0, 0]}, id="size overflows"),
    ],
)
def test_a_tensor_that_torch_cannot_hold_is_refused(folder: Path, tensor: dict[str, Any]) -> None:
    header = json.dumps({f"{Q}.mask": tensor}).encode()
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(tensor["data_offsets"][1]))
    sign(folder, json.loads((folder / CONFIG_FILE).read_bytes()))
    assert any(fault.startswith((WEIGHTS_FILE, f"{Q}.mask")) for fault in faults_of(folder))


def corruptions(whole: bytes, count: int, rng: random.Random) -> list[bytes]:
    """Return copies of `whole` with one changed byte: half of them by one bit, the others to a random byte."""
    copies = []
    for i in range(count):
        at = rng.randrange(len(whole))
        byte = whole[at] ^ (1 << rng.randrange(8)) if i % 2 else rng.choice([b for b in range(256) if b != whole[at]])
        copies.append(whole[:at] + bytes([byte]) + whole[at + 1 :])
    return copies


@pytest.mark.slow
def test_one_wrong_byte_in_the_weights_is_always_found(folder: Path) -> None:
    for weights in corruptions((folder / WEIGHTS_FILE).read_bytes(), 400, random.Random(1)):
        (folder / WEIGHTS_FILE).write_bytes(weights)
        assert faults_of(folder)


@pytest.mark.slow
def test_one_wrong_byte_in_a_signed_file_gives_an_adapter_or_a_format_error(folder: Path) -> None:
    raw, loaded = json.loads((folder / CONFIG_FILE).read_bytes()), []
    for weights in corruptions((folder / WEIGHTS_FILE).read_bytes(), 400, random.Random(2)):
        (folder / WEIGHTS_FILE).write_bytes(weights)
        sign(folder, raw)
        loaded.append(load_if_sound(folder))
    sound = [adapter for adapter in loaded if adapter]
    assert 0 < len(sound) < 400  # a changed value gives a sound adapter, a changed header does not
    assert all(b.values.isfinite().all() for adapter in sound for b in adapter.modules.values())


@pytest.mark.slow
def test_one_wrong_byte_in_the_config_never_gives_another_adapter(folder: Path) -> None:
    before, loaded = effect(load(folder)), []
    for config in corruptions((folder / CONFIG_FILE).read_bytes(), 600, random.Random(3)):
        (folder / CONFIG_FILE).write_bytes(config)
        loaded.append(load_if_sound(folder))
    sound = [adapter for adapter in loaded if adapter]
    assert 0 < len(sound) < 300  # changes of white space or of a record
    assert all(effect(adapter) == before for adapter in sound)


def test_adapters_on_some_layers_do_not_need_the_others(tmp_path: Path) -> None:
    config = make_config(targets=("o_proj",))
    save(tmp_path / "a", config, make_modules(targets=("o_proj",)))
    loaded = load(tmp_path / "a")
    assert list(loaded.modules) == ["layers.0.o_proj"]
    assert loaded.modules["layers.0.o_proj"].mask.shape == (5, RANK)
    assert isinstance(loaded.config, AdapterConfig)


# --- how the values are stored


@pytest.mark.parametrize("values", VALUE_TYPES)
def test_save_load_save_gives_identical_bytes_whatever_the_values(tmp_path: Path, values: ValueType) -> None:
    saved = save(tmp_path / "a", make_config(values=values), make_modules(density=0.2))
    loaded = load(tmp_path / "a")
    assert effect(loaded) == effect(saved)
    save_adapter(loaded, tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")


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


def test_a_folder_verifies_itself_without_a_base(folder: Path) -> None:
    assert effect(load_adapter(folder)) == effect(load(folder))


def test_without_a_base_layers_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    shapes = {f"layers.{i}.q_proj": (4, 3) for i in range(12)}
    save(tmp_path / "a", make_config(shapes, ("q_proj",)), make_modules(shapes, ("q_proj",)))
    assert list(load_adapter(tmp_path / "a").modules) == list(shapes)


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


def test_a_config_may_have_any_spacing_and_order(folder: Path) -> None:
    raw = json.loads((folder / CONFIG_FILE).read_bytes())
    before = effect(load(folder))
    (folder / CONFIG_FILE).write_text(json.dumps(dict(reversed(raw.items())), indent=7))
    assert effect(load(folder)) == before


# --- adapters and records that cannot be saved


def test_an_adapter_that_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    # Regression: each was saved silently and then refused by load.
    for modules in ({}, make_modules(rank=2), make_modules() | {"layers.9.k_proj": make_modules()[Q]}):
        with pytest.raises(AdapterFormatError):
            save(tmp_path / "a", make_config(), modules)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_whose_basis_differs_from_its_config_is_not_saved(tmp_path: Path) -> None:
    adapter = replace(make_adapter("a"), basis=Seeded(77))
    with pytest.raises(AdapterFormatError, match="its basis is seed 77, stream 0, and its config's seed 5, stream 1"):
        save_adapter(adapter, tmp_path / "a")


def test_a_record_that_changes_what_an_adapter_does_is_refused(folder: Path) -> None:
    before, config = content(folder), load(folder).config
    with pytest.raises(AdapterFormatError, match="not that of its weights"):
        write_record(folder, config.model_copy(update={"lora_alpha": 99.0}), "# card")
    assert content(folder) == before


@pytest.mark.parametrize("key", ["config_digest", "content_digest", "shapes", "basis", "templates", "sparsity"])
def test_a_config_that_lacks_a_field_is_refused(folder: Path, key: str) -> None:
    # Regression: a config without its own digest raised a KeyError.
    raw = json.loads((folder / CONFIG_FILE).read_bytes())
    raw["lori"].pop(key)
    (folder / CONFIG_FILE).write_text(json.dumps(raw))
    assert f"{CONFIG_FILE}: lori.{key}: Field required" in faults_of(folder)


def test_a_missing_file_hides_no_other_fault(folder: Path) -> None:
    # Regression: a changed config was reported only after the missing weights were back.
    raw = json.loads((folder / CONFIG_FILE).read_bytes())
    (folder / CONFIG_FILE).write_text(json.dumps(raw | {"lora_alpha": 99.0}))
    (folder / WEIGHTS_FILE).unlink()
    first, second = faults_of(folder)
    assert first == f"{WEIGHTS_FILE} cannot be read: No such file or directory"
    assert second.startswith(f"{CONFIG_FILE}: its digest is ")


def test_a_folder_of_format_1_is_refused_as_outdated(folder: Path) -> None:
    raw = json.loads((folder / CONFIG_FILE).read_bytes())
    raw["lori"]["format_version"] = 1
    (folder / CONFIG_FILE).write_text(json.dumps(raw))
    assert any("format 1 is not read any more" in fault for fault in faults_of(folder))


@pytest.mark.parametrize("field", ["metrics", "merge_weights", "training", "lora_dropout"])
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_json_lacks_is_refused(folder: Path, field: str, number: str) -> None:
    raw = json.loads((folder / CONFIG_FILE).read_bytes())
    value = float(number)
    changed = {"metrics": {"x": value}, "merge_weights": {"x": [1, value]}, "training": {"deep": [{"x": value}]}}.get(
        field, value
    )
    (raw if field == "lora_dropout" else raw["lori"])[field] = changed
    sign_config(folder, raw)
    assert any(field in fault for fault in faults_of(folder))


def test_an_overlong_mask_is_refused_before_it_is_decoded(folder: Path) -> None:
    # Regression: 20 MB of ones took 2 GB of memory.
    forge(folder, lambda t: t.update({f"{Q}.mask": torch.full((2**20,), 255, dtype=torch.uint8)}))
    assert any("more than any mask of 27 entries" in fault for fault in faults_of(folder))


def test_an_oversized_a_is_not_drawn(tmp_path: Path) -> None:
    # Regression: a file of 3 kB could make the loader draw for hours.
    shapes = {f"layers.{i}.q_proj": (1, 2**24) for i in range(65)}
    config = make_config({"layers.0.q_proj": (1, 4)}, ("q_proj",), rank=1)
    save(tmp_path / "a", config, make_modules({"layers.0.q_proj": (1, 4)}, ("q_proj",), rank=1))

    def grow(t: Tensors) -> None:
        t.update({f"{module}.{part}": t[f"{Q}.{part}"].clone() for module in shapes for part in ("mask", "values")})

    forge(tmp_path / "a", grow, lambda raw: raw["lori"]["shapes"].update(q_proj=[1, 2**24]))
    with pytest.raises(AdapterFormatError, match="A has 1090519040 entries, expected 1073741824 at most"):
        load_adapter(tmp_path / "a")


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


@pytest.mark.parametrize("what", ["a store", "a file", "a folder of notes"])
def test_saving_replaces_only_adapters(tmp_path: Path, what: str) -> None:
    # Regression: a store that was named in place of store/name was deleted with all of its content.
    target = tmp_path / "target"
    if what == "a file":
        target.write_text("x")
    else:
        (target / "math@aaaaaaaaaaaa").mkdir(parents=True)
        (target / "notes.txt").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(AdapterError, match="is there and is no adapter: nothing is saved over it"):
        save(target, make_config(), make_modules())
    assert sorted(tmp_path.rglob("*")) == before


def test_an_adapter_is_saved_into_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    save(tmp_path / "a", make_config(), make_modules())
    assert load(tmp_path / "a")


def test_a_module_that_its_explicit_basis_lacks_is_refused(tmp_path: Path) -> None:
    # Regression: an A of zeros, of any size, was assumed.
    basis = Explicit.from_tensors({Q: Seeded(5, 1).draw(Q, RANK, 5)})
    with pytest.raises(AdapterFormatError, match=r"layers\.1\.q_proj: its basis has no A for it"):
        save(tmp_path / "a", make_config(targets=("q_proj",)), make_modules(targets=("q_proj",)), basis)


def test_an_oversized_config_is_not_read(folder: Path) -> None:
    with (folder / CONFIG_FILE).open("ab") as file:
        file.truncate(2**40)
    assert any("it has 1099511627776 bytes" in fault for fault in faults_of(folder))
