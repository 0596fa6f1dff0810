"""An adapter on disk: writing and reading restore it, and what could not be read is not written."""

import json
import math
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lori.basis import Explicit, Seeded
from lori.config import CONFIG_FILE, AdapterConfig
from lori.errors import AdapterError, AdapterFormatError
from lori.format import WEIGHTS_FILE, load_adapter, read_config, save_adapter, write_record
from lori.sparse import VALUE_TYPES, SparseB, ValueType
from lori.weights import weight_bytes
from tests.lori.adapters import RANK, SHAPES, make_adapter, make_config, make_modules, save
from tests.lori.forged import Q, content, effect, load


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Context manager: every write of this process beyond `num_bytes` of a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


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


def test_finite_values_whose_sum_overflows_come_back(tmp_path: Path) -> None:
    modules = make_modules()
    modules[Q] = SparseB((9, RANK), torch.arange(2, dtype=torch.int32), torch.full((2,), 3e38))
    saved = save(tmp_path / "a", make_config(), modules)
    assert effect(load(tmp_path / "a")) == effect(saved)


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


def test_read_config_reads_the_config_alone(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    assert read_config(folder).lori.metrics == {"loss": 1.25}


def test_adapters_on_some_layers_do_not_need_the_others(tmp_path: Path) -> None:
    config = make_config(targets=("o_proj",))
    save(tmp_path / "a", config, make_modules(targets=("o_proj",)))
    loaded = load(tmp_path / "a")
    assert list(loaded.modules) == ["layers.0.o_proj"]
    assert loaded.modules["layers.0.o_proj"].mask.shape == (5, RANK)
    assert isinstance(loaded.config, AdapterConfig)


@pytest.mark.parametrize("values", VALUE_TYPES)
def test_save_load_save_gives_identical_bytes_whatever_the_values(tmp_path: Path, values: ValueType) -> None:
    saved = save(tmp_path / "a", make_config(values=values), make_modules(density=0.2))
    loaded = load(tmp_path / "a")
    assert effect(loaded) == effect(saved)
    save_adapter(loaded, tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_a_config_may_have_any_spacing_and_order(folder: Path) -> None:
    raw = json.loads((folder / CONFIG_FILE).read_bytes())
    before = effect(load(folder))
    (folder / CONFIG_FILE).write_text(json.dumps(dict(reversed(raw.items())), indent=7))
    assert effect(load(folder)) == before


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


# --- without a base


def test_a_folder_verifies_itself_without_a_base(folder: Path) -> None:
    assert effect(load_adapter(folder)) == effect(load(folder))


def test_without_a_base_layers_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    shapes = {f"layers.{i}.q_proj": (4, 3) for i in range(12)}
    save(tmp_path / "a", make_config(shapes, ("q_proj",)), make_modules(shapes, ("q_proj",)))
    assert list(load_adapter(tmp_path / "a").modules) == list(shapes)


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


def test_a_module_that_its_explicit_basis_lacks_is_refused(tmp_path: Path) -> None:
    # Regression: an A of zeros, of any size, was assumed.
    basis = Explicit.from_tensors({Q: Seeded(5, 1).draw(Q, RANK, 5)})
    with pytest.raises(AdapterFormatError, match=r"layers\.1\.q_proj: its basis has no A for it"):
        save(tmp_path / "a", make_config(targets=("q_proj",)), make_modules(targets=("q_proj",)), basis)
