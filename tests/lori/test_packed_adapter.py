"""An adapter packed directly from its file: the result, and the faults, equal those of loading and packing it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from lori import packed_adapter
from lori.basis import Explicit
from lori.config import CONFIG_FILE, AdapterConfig, config_digest
from lori.errors import AdapterError, AdapterFormatError
from lori.format import WEIGHTS_FILE, content_digest, load_adapter
from lori.identity import BaseIdentity
from lori.kernels.layout import Layout, unpack
from lori.packed_adapter import PackedAdapter, PackedReader, pack_adapter
from lori.sparse import VALUE_TYPES, ValueType
from lori.store.entry import Entry
from lori.store.store import AdapterStore
from tests.lori.adapters import BASE, BASE_DIGEST, RANK, SHAPES, make_config, make_modules, save, targeted

WIDE = {"m.0.q_proj": (600, 9), "m.0.up_proj": (40, 7), "m.1.q_proj": (600, 9), "m.1.up_proj": (40, 7)}
"""Shapes whose B has several windows."""


def layouts(dtype: torch.dtype = torch.bfloat16, rank: int = 8, shapes: dict[str, tuple[int, int]] = SHAPES) -> dict[str, Layout]:
    return {name: Layout(num_outputs, rank, dtype) for name, (num_outputs, _) in shapes.items()}


def assert_same(ours: PackedAdapter, theirs: PackedAdapter) -> None:
    assert (ours.name, ours.config, ours.basis, ours.version) == (theirs.name, theirs.config, theirs.basis, theirs.version)
    assert list(ours.modules.layouts.items()) == list(theirs.modules.layouts.items())
    assert torch.equal(ours.modules.blocks, theirs.modules.blocks)
    assert torch.equal(ours.modules.starts, theirs.modules.starts)
    assert ours.modules.ends == theirs.modules.ends


def faults_of(read: Callable[[], object]) -> AdapterFormatError:
    with pytest.raises(AdapterFormatError) as caught:
        read()
    return caught.value


@pytest.fixture
def _no_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every parse of a whole adapter fail, so a test fails if the reader does not pack directly from the file."""

    def parse(*_: object, **__: object) -> None:
        raise AssertionError("it was read in the long way")

    monkeypatch.setattr(packed_adapter, "parse_adapter", parse)


@pytest.mark.usefixtures("_no_long_way")
@pytest.mark.parametrize("values", VALUE_TYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [8, 300])
@pytest.mark.parametrize("density", [0.0, 0.004, 0.1, 0.4, 1.0])
def test_a_packed_file_equals_the_packing_of_the_loaded_adapter(
    tmp_path: Path, values: ValueType, dtype: torch.dtype, rank: int, density: float
) -> None:
    base = BaseIdentity("a/base", BASE_DIGEST, WIDE)
    save(tmp_path / "math", make_config(WIDE, values=values), make_modules(WIDE, density=density))
    targets = layouts(dtype, rank, WIDE)
    packed = PackedReader(base, targets).read(tmp_path / "math")
    assert_same(packed, pack_adapter(load_adapter(tmp_path / "math", base), targets))
    assert packed.num_bytes == packed.modules.blocks.nbytes + packed.modules.starts.nbytes


@pytest.mark.usefixtures("_no_long_way")
@pytest.mark.parametrize("values", VALUE_TYPES)
def test_ranks_and_alphas_of_single_modules_are_in_the_packed_b(tmp_path: Path, values: ValueType) -> None:
    # If a module has another alpha / r, its B is scaled, since a term's weight includes the alpha / r of most modules.
    own, other = "layers.0.q_proj", "layers.1.up_proj"
    modules = make_modules() | {other: make_modules(rank=5)[other]}
    config = make_config(values=values)
    ranks = {name: (5 if name == other else RANK, shape[1]) for name, shape in targeted(SHAPES).items()}
    section = config.lori.model_copy(update={"basis_digest": config.lori.basis.basis().digest(ranks)})
    changed = {"alpha_pattern": {own: 1.7}, "rank_pattern": {other: 5}, "lori": section}
    saved = save(tmp_path / "math", config.model_copy(update=changed), modules)
    packed = PackedReader(BASE, layouts()).read(tmp_path / "math")
    assert_same(packed, pack_adapter(saved, layouts()))
    plain = pack_adapter(load_adapter(tmp_path / "math", BASE), layouts())
    assert_same(packed, plain)
    scaled = packed.modules.by_module[own]
    expected = (1.7 / RANK / (6.0 / RANK)) * saved.modules[own].dense()
    torch.testing.assert_close(unpack(scaled.layout, scaled.blocks, scaled.starts)[:, :RANK], expected, rtol=2**-8, atol=0)


@pytest.mark.usefixtures("_no_long_way")
def test_an_adapter_with_an_explicit_basis_is_read(tmp_path: Path) -> None:
    basis = Explicit.from_tensors({name: torch.randn(RANK, num_inputs) for name, (_, num_inputs) in targeted(SHAPES).items()})
    config = make_config()
    digest = basis.digest({name: (RANK, num_inputs) for name, (_, num_inputs) in targeted(SHAPES).items()})
    section = config.lori.model_copy(update={"basis_digest": digest})
    save(tmp_path / "math", config.model_copy(update={"lori": section}), make_modules(), basis)
    packed = PackedReader(BASE, layouts()).read(tmp_path / "math")
    assert packed.basis == basis
    assert_same(packed, pack_adapter(load_adapter(tmp_path / "math", BASE), layouts()))


def test_without_the_compiled_module_the_result_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "math", make_config(), make_modules())
    reader = PackedReader(BASE, layouts())
    packed = reader.read(tmp_path / "math")
    monkeypatch.setattr(packed_adapter, "MODULE", None)
    assert_same(packed, reader.read(tmp_path / "math"))


# --- unsound files, and files of other programs


def rewrite(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any], metadata: dict[str, str] | None = None) -> None:
    """Change the tensors of an adapter and give it matching digests, as a forger would."""
    tensors = load_tensors((folder / WEIGHTS_FILE).read_bytes())
    edit(tensors)
    sign(folder, save_tensors(tensors, metadata))


def sign(folder: Path, weights: bytes) -> None:
    raw = json.loads((folder / CONFIG_FILE).read_bytes())
    (folder / WEIGHTS_FILE).write_bytes(weights)
    raw["lori"]["content_digest"] = content_digest(weights, AdapterConfig.model_validate_json(json.dumps(raw)))
    raw["lori"]["config_digest"] = config_digest(json.dumps(raw).encode())
    (folder / CONFIG_FILE).write_text(json.dumps(raw))


Q = "layers.0.q_proj"
SPOILT: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "a tensor is missing": lambda tensors: tensors.pop(f"{Q}.mask"),
    "an unknown tensor": lambda tensors: tensors.update({"more.mask": torch.ones(3, dtype=torch.uint8)}),
    "a part that these values do not have": lambda tensors: tensors.update({f"{Q}.scales": torch.ones(9).bfloat16()}),
    "a value that is not finite": lambda tensors: tensors[f"{Q}.values"].__setitem__(1, torch.inf),
    "a value that is no number": lambda tensors: tensors[f"{Q}.values"].__setitem__(-1, torch.nan),
    "a value less": lambda tensors: tensors.update({f"{Q}.values": tensors[f"{Q}.values"][:-1].clone()}),
    "another dtype": lambda tensors: tensors.update({f"{Q}.values": tensors[f"{Q}.values"].float()}),
    "two dimensions": lambda tensors: tensors.update({f"{Q}.values": tensors[f"{Q}.values"][None].clone()}),
    "a mask with a bit more": lambda tensors: tensors[f"{Q}.mask"].__setitem__(-1, 0x80),
    "a longer mask": lambda tensors: tensors.update({f"{Q}.mask": torch.cat([tensors[f"{Q}.mask"]] * 2)}),
    "an empty mask": lambda tensors: tensors.update({f"{Q}.mask": torch.zeros(0, dtype=torch.uint8)}),
}


@pytest.mark.parametrize("what", SPOILT)
def test_an_unsound_adapter_is_refused_with_the_faults_of_a_load(tmp_path: Path, what: str) -> None:
    save(tmp_path / "math", make_config(), make_modules())
    rewrite(tmp_path / "math", SPOILT[what])
    ours = faults_of(lambda: PackedReader(BASE, layouts()).read(tmp_path / "math"))
    theirs = faults_of(lambda: load_adapter(tmp_path / "math", BASE))
    assert (ours.source, ours.faults) == (theirs.source, theirs.faults)


SPOILT_INT8: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "a scale that is not of its values": lambda tensors: tensors[f"{Q}.scales"].__setitem__(0, torch.nan),
    "a scale below 0": lambda tensors: tensors[f"{Q}.scales"].neg_(),
    "a subnormal scale": lambda tensors: tensors[f"{Q}.scales"].view(torch.int16).__setitem__(0, 1),
    "a scale whose product is infinite": lambda tensors: tensors[f"{Q}.scales"].fill_(3e38),
    "a row without its peak": lambda tensors: tensors[f"{Q}.values"].clamp_(-126, 126),
    "-128": lambda tensors: tensors[f"{Q}.values"].masked_fill_(tensors[f"{Q}.values"] < 100, -128),
    "a scale less": lambda tensors: tensors.update({f"{Q}.scales": tensors[f"{Q}.scales"][:-1].clone()}),
}


@pytest.mark.parametrize("what", SPOILT_INT8)
def test_int8_that_is_not_canonical_is_refused_with_the_faults_of_a_load(tmp_path: Path, what: str) -> None:
    save(tmp_path / "math", make_config(values="int8"), make_modules())
    rewrite(tmp_path / "math", SPOILT_INT8[what])
    ours = faults_of(lambda: PackedReader(BASE, layouts()).read(tmp_path / "math"))
    assert ours.faults == faults_of(lambda: load_adapter(tmp_path / "math", BASE)).faults


def test_a_file_of_another_program_is_loaded_and_then_packed(tmp_path: Path) -> None:
    save(tmp_path / "math", make_config(), make_modules())
    rewrite(tmp_path / "math", lambda _: None, {"format": "pt"})
    assert_same(
        PackedReader(BASE, layouts()).read(tmp_path / "math"),
        pack_adapter(load_adapter(tmp_path / "math", BASE), layouts()),
    )


HEADERS: dict[str, Callable[[bytes], bytes]] = {
    "a tensor twice": lambda text: text.replace(
        b"{", b'{"layers.0.q_proj.mask":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},', 1
    ),
    "a field twice": lambda text: text.replace(b'"dtype":"U8"', b'"dtype":"U8","dtype":"U8"', 1),
    "a number with a sign": lambda text: text.replace(b"[0,", b"[-0,", 1),
    "spaces": lambda text: text.replace(b":", b" : "),
    "an escape": lambda text: text.replace(b"layers", b"\\u006cayers", 1),
    "more after it": lambda text: text.rstrip() + b"x",
    "nothing": lambda _: b"",
    "no object": lambda text: text.replace(b"{", b"[", 1),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_of_another_form_is_read_or_refused_as_a_load_does(tmp_path: Path, what: str) -> None:
    save(tmp_path / "math", make_config(), make_modules())
    weights = (tmp_path / "math" / WEIGHTS_FILE).read_bytes()
    end = 8 + int.from_bytes(weights[:8], "little")
    header = HEADERS[what](weights[8:end])
    header += b" " * (-len(header) % 8)
    sign(tmp_path / "math", len(header).to_bytes(8, "little") + header + weights[end:])
    assert_read_alike(tmp_path / "math")


def outcome(read: Callable[[], PackedAdapter]) -> PackedAdapter | tuple[str, tuple[str, ...]]:
    """Return the packed adapter, or the source and the faults of its refusal."""
    try:
        return read()
    except AdapterFormatError as error:
        return error.source, error.faults


def assert_read_alike(folder: Path) -> None:
    """Assert that the reader reads or refuses the adapter as loading and packing it do."""
    ours = outcome(lambda: PackedReader(BASE, layouts()).read(folder))
    theirs = outcome(lambda: pack_adapter(load_adapter(folder, BASE), layouts()))
    if isinstance(ours, PackedAdapter) and isinstance(theirs, PackedAdapter):
        assert_same(ours, theirs)
    else:
        assert ours == theirs


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.one_of(st.none(), st.integers(0, 10**6)),
    values=st.sampled_from(VALUE_TYPES),
)
def test_a_file_with_any_changed_bytes_is_read_or_refused_as_a_load_does(
    tmp_path: Path, changes: list[tuple[int, int]], cut: int | None, values: ValueType
) -> None:
    save(tmp_path / "math", make_config(values=values), make_modules())
    weights = bytearray((tmp_path / "math" / WEIGHTS_FILE).read_bytes())
    for place, byte in changes:
        weights[place % len(weights)] = byte
    sign(tmp_path / "math", bytes(weights[: len(weights) if cut is None else cut % len(weights)]))
    assert_read_alike(tmp_path / "math")


def test_files_that_cannot_be_read_and_configs_that_are_not_sound_are_refused_as_a_load_does(tmp_path: Path) -> None:
    assert_read_alike(tmp_path / "nowhere")
    save(tmp_path / "math", make_config(), make_modules())
    weights = (tmp_path / "math" / WEIGHTS_FILE).read_bytes()
    (tmp_path / "math" / WEIGHTS_FILE).write_bytes(weights + b"x")  # no longer matches the digest
    assert_read_alike(tmp_path / "math")
    (tmp_path / "math" / WEIGHTS_FILE).unlink()
    assert_read_alike(tmp_path / "math")
    (tmp_path / "math" / CONFIG_FILE).write_text("{}")
    assert_read_alike(tmp_path / "math")


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"base_digest": "c" * 64}, id="another base"),
        pytest.param({"basis_digest": "d" * 64}, id="another A"),
        pytest.param({"shapes": {"q_proj": (9, 5), "up_proj": (16, 8)}}, id="other shapes"),
        pytest.param({"shapes": {"q_proj": (9, 5)}}, id="no shape"),
    ],
)
def test_an_adapter_of_another_base_is_refused_as_a_load_does(tmp_path: Path, config: dict[str, Any]) -> None:
    save(tmp_path / "other", make_config(), make_modules())
    reader = PackedReader(BASE, layouts())
    reader.read(tmp_path / "other")  # makes the reader remember the plan of this recipe
    save(tmp_path / "math", make_config(), make_modules())
    raw = json.loads((tmp_path / "math" / CONFIG_FILE).read_bytes())
    raw["lori"].update(config)
    (tmp_path / "math" / CONFIG_FILE).write_text(json.dumps(raw))
    sign(tmp_path / "math", (tmp_path / "math" / WEIGHTS_FILE).read_bytes())
    ours, theirs = faults_of(lambda: reader.read(tmp_path / "math")), faults_of(lambda: load_adapter(tmp_path / "math", BASE))
    assert ours.faults == theirs.faults


# --- served layouts and versions


def test_an_adapter_that_does_not_fit_the_served_layouts_is_refused_with_every_fault(tmp_path: Path) -> None:
    saved = save(tmp_path / "math", make_config(), make_modules())
    narrow = layouts(rank=2)
    del narrow[Q]
    for read in (lambda: PackedReader(BASE, narrow).read(tmp_path / "math"), lambda: pack_adapter(saved, narrow)):
        with pytest.raises(AdapterError, match=f"{Q}: no adapters of this module are; .*: rank 3, expected at most 2"):
            read()


def test_an_entry_is_read_under_its_name_and_must_be_its_version(tmp_path: Path) -> None:
    save(tmp_path / "made" / "math", make_config(), make_modules())
    entry = AdapterStore(tmp_path / "store").publish(tmp_path / "made" / "math", "algebra")
    reader = PackedReader(BASE, layouts())
    assert (reader.read_entry(entry).name, reader.read_entry(entry).version) == ("algebra", entry.version)
    moved = entry.folder.rename(entry.folder.with_name("algebra@0123456789ab"))
    wrong = Entry("algebra", moved)
    ours, theirs = faults_of(lambda: reader.read_entry(wrong)), faults_of(lambda: wrong.load(BASE))
    assert (ours.source, ours.faults) == (theirs.source, theirs.faults)
