"""Summaries of adapters, read from their configs alone."""

import json
from pathlib import Path

import pytest

from lori.config import CONFIG_FILE, SeededConfig
from lori.errors import AdapterFormatError
from lori.format import WEIGHTS_FILE, load_adapter
from lori.prompt_statistics import STATISTICS_FILE
from lori.store.entry import Entry
from lori.store.store import AdapterStore
from lori.summary import summarise
from tests.lori.adapters import BASE, make_config, make_modules, save, write_statistics


def entry(folder: Path, **section: object) -> Entry:
    save(folder, make_config(**section), make_modules())
    return Entry(folder.name.partition("@")[0], folder)


def test_a_summary_describes_the_adapter_without_reading_weights(tmp_path: Path) -> None:
    math = entry(tmp_path / "math", templates=("plain", "chat"), metrics={"loss": 0.5}, merge_weights={"x": (1.0, 0.8)})
    adapter = load_adapter(math.folder, BASE)
    assert math.num_bytes == sum(file.stat().st_size for file in math.folder.iterdir())
    weights = (math.folder / WEIGHTS_FILE).read_bytes()
    (math.folder / WEIGHTS_FILE).write_bytes(weights[:-9] + b"\0" * 9)
    summary = summarise({"algebra": math}, BASE)["algebra"]
    assert (summary.name, summary.version) == ("math", adapter.version)
    assert (summary.digest, summary.basis) == (adapter.config.lori.content_digest, adapter.config.lori.basis)
    assert (summary.rank, summary.max_rank, summary.alpha, summary.scale) == (3, 3, 6.0, 2.0)
    assert (summary.targets, summary.sparsity) == (adapter.config.target_modules, 0.6)
    assert (summary.templates, summary.metrics, summary.merge_weights) == (("plain", "chat"), {"loss": 0.5}, {"x": (1.0, 0.8)})
    assert isinstance(summary.basis, SeededConfig)
    assert summary.num_bytes == math.num_bytes == len(weights) + (math.folder / CONFIG_FILE).stat().st_size
    assert Entry("nobody", tmp_path / "nobody").num_bytes == 0


def test_the_highest_rank_counts_single_modules(tmp_path: Path) -> None:
    config = make_config().model_copy(update={"rank_pattern": {"layers.0.up_proj": 5}})
    modules = make_modules() | {"layers.0.up_proj": make_modules(rank=5)["layers.0.up_proj"]}
    ranks = {
        name: (5 if name == "layers.0.up_proj" else 3, shape[1]) for name, shape in BASE.shapes.items() if "o_proj" not in name
    }
    assert isinstance(config.lori.basis, SeededConfig)
    section = config.lori.model_copy(update={"basis_digest": config.lori.basis.basis().digest(ranks)})
    save(tmp_path / "math", config.model_copy(update={"lori": section}), modules)
    summary = summarise({"math": Entry("math", tmp_path / "math")}, BASE)["math"]
    assert (summary.rank, summary.max_rank) == (3, 5)


def test_a_store_is_summarised_by_name_and_alias(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    published = store.publish(entry(tmp_path / "math").folder)
    store.alias("best", "math")
    summaries = summarise(store.current(), BASE)
    assert {name: row.version for name, row in summaries.items()} == {"best": published.version, "math": published.version}


def test_the_faults_of_all_are_reported_at_once(tmp_path: Path) -> None:
    entries = {name: entry(tmp_path / name) for name in ("sound", "torn", "gone", "math@0123456789ab")}
    entries["other"] = entry(tmp_path / "other", base_digest="c" * 64)
    entries["others"] = entry(tmp_path / "others", base_digest="c" * 64)
    config = tmp_path / "torn" / CONFIG_FILE
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 0}))
    (tmp_path / "gone" / CONFIG_FILE).unlink()
    with pytest.raises(AdapterFormatError) as caught:
        summarise(entries, BASE)
    assert caught.value.source == "what is to be served"
    sources = sorted(fault.partition(": ")[0] for fault in caught.value.faults)
    assert sources == sorted(str(tmp_path / name) for name in ("torn", "gone", "math@0123456789ab", "other", "others"))
    assert sum("trained on the base" in fault for fault in caught.value.faults) == 2
    assert any("its version is" in fault and "expected 0123456789ab" in fault for fault in caught.value.faults)


def test_a_summary_has_the_statistics_of_the_adapter_s_prompts(tmp_path: Path) -> None:
    math = entry(tmp_path / "math")
    assert summarise({"math": math}, BASE)["math"].prompt_statistics is None
    write_statistics(math.folder)
    summary = summarise({"math": math}, BASE)["math"]
    assert summary.prompt_statistics is not None
    assert summary.prompt_statistics.adapter_digest == summary.digest


def test_faults_of_statistics_are_reported_with_the_others(tmp_path: Path) -> None:
    names = ("other's", "damaged", "linked")
    entries = {name: entry(tmp_path / name, base_digest="c" * 64) for name in names}
    write_statistics(tmp_path / "other's", "0" * 64)
    (tmp_path / "damaged" / STATISTICS_FILE).write_bytes(b"x")
    (tmp_path / "linked" / STATISTICS_FILE).symlink_to("elsewhere")
    version = load_adapter(tmp_path / "other's").version
    with pytest.raises(AdapterFormatError) as caught:
        summarise(entries, BASE)
    expected = (
        f"{STATISTICS_FILE}: belongs to the version 000000000000, expected {version}",
        f"{STATISTICS_FILE}: is not a safetensors file",
        f"{STATISTICS_FILE} cannot be read: it is a link, and a store follows none",
    )
    for name, fault in zip(names, expected, strict=True):
        own = [line for line in caught.value.faults if line.startswith(f"{tmp_path / name}: ")]
        assert any("trained on the base" in line for line in own)
        assert any(fault in line for line in own), own
