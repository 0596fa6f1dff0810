"""The registry of adapters while it changes: look-ups by name, by version and by content."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lori.config import SeededConfig
from lori.store.entry import Entry
from lori.summary import Summary
from server.engine.adapters.registry import MAX_CALLERS, Registered, Registry

BASIS = SeededConfig(generator="philox-u24-1", seed=0, stream=0)


def adapter(name: str, digit: str, folder: str = "") -> Registered:
    """Return an adapter whose digest is `digit` repeated."""
    summary = Summary(
        name=name, digest=digit * 64, basis=BASIS, rank=4, max_rank=4, alpha=8.0, scale=2.0, targets=("q_proj",), sparsity=0.9,
        nnz=10, templates=("chat",), merge_weights={}, metrics={}, num_bytes=100,
    )  # fmt: skip
    return Registered(Entry(name, Path(folder or f"{name}@{summary.version}")), summary)


def names(registry: Registry) -> dict[str, list[str]]:
    """Return the versions of each name, the current one first, as the first digits of their digests."""
    return {name: [version.summary.digest[0] for version in registry.versions(name)] for name in registry.by_name}


def test_a_name_means_the_adapter_put_last_and_older_ones_have_versions() -> None:
    registry = Registry([adapter("math", "1"), adapter("safety", "5")])
    gone = registry.put(adapter("math", "2"), [adapter("math", "1")])
    assert gone == []
    assert names(registry) == {"math": ["2", "1"], "safety": ["5"]}
    assert registry.by_name["math"].summary.digest[0] == "2"
    assert registry.has("math", "1" * 64)
    assert registry.has("math", "2" * 64)
    assert not registry.has("safety", "1" * 64)


def test_a_version_that_is_not_put_again_is_found_by_content_until_it_is_forgotten() -> None:
    registry = Registry([adapter("math", "1")], [adapter("math", "0")])
    gone = registry.put(adapter("math", "2"), [adapter("math", "0")])
    assert gone == [adapter("math", "1")]
    assert names(registry) == {"math": ["2", "0"]}
    assert not registry.has("math", "1" * 64)
    assert registry.find("1" * 64, ()) == [adapter("math", "1")]
    registry.forget(gone[0])
    assert registry.find("1" * 64, ()) == []


def test_an_adapter_that_is_put_twice_is_listed_once() -> None:
    registry = Registry([adapter("math", "1")])
    registry.put(adapter("math", "1", "elsewhere"), [adapter("math", "1")])
    assert names(registry) == {"math": ["1"]}
    assert registry.find("1" * 64, ()) == [adapter("math", "1", "elsewhere")]


def test_what_was_read_of_a_version_holds_for_its_aliases() -> None:
    """Regression: an alias kept the statistics that its version had when the alias was loaded."""

    def metrics(name: str) -> list[Mapping[str, float]]:
        """Return those of the version "1", however it is found."""
        found = [registry.by_name[name], *registry.versions(name), *registry.find("1" * 64, [name])[:1]]
        return [one.summary.metrics for one in found if one.summary.digest[0] == "1"]

    alias = adapter("prod", "1", "math@1")
    registry = Registry([adapter("math", "1", "math@1"), alias, adapter("copy", "1", "copy@1")])
    measured = adapter("math", "1", "math@1")
    registry.put(replace(measured, summary=replace(measured.summary, metrics={"loss": 0.5})))
    assert metrics("math") == metrics("prod") == [{"loss": 0.5}] * 3
    assert metrics("copy") == [{}] * 3, "it has files of its own"
    registry.put(alias)
    assert metrics("math") == metrics("prod") == [{}] * 3
    assert names(registry) == {"math": ["1"], "prod": ["1"], "copy": ["1"]}


def test_a_sound_version_of_a_name_whose_current_version_is_damaged_may_be_aliased_and_withdrawn() -> None:
    """Regression: a KeyError, after the store was changed."""
    old = adapter("math", "1", "math@1")
    registry = Registry([], [old])
    registry.put(adapter("prod", "1", "math@1"))
    assert names(registry) == {"prod": ["1"]}
    assert registry.versions("math") == (old,)
    registry.withdraw_version(old)
    assert registry.versions("math") == ()
    assert registry.has("prod", "1" * 64)


def test_a_name_is_withdrawn_with_its_versions() -> None:
    registry = Registry([adapter("math", "1"), adapter("prod", "1")], [adapter("math", "0")])
    assert registry.withdraw("math") == (adapter("math", "1"), adapter("math", "0"))
    assert names(registry) == {"prod": ["1"]}
    assert registry.withdraw("math") == ()
    registry.forget(adapter("math", "1"))
    assert registry.find("1" * 64, ("math",)) == [adapter("prod", "1")], "the alias still has this content"


def test_a_version_is_withdrawn_alone() -> None:
    registry = Registry([adapter("math", "1")], [adapter("math", "0")])
    registry.withdraw_version(adapter("math", "0"))
    assert names(registry) == {"math": ["1"]}
    assert registry.find("0" * 64, ()) == [adapter("math", "0")]


def test_versions_are_added_without_changing_what_a_name_means() -> None:
    registry = Registry([adapter("math", "1")])
    registry.add([adapter("math", "0"), adapter("math", "1", "again"), adapter("safety", "5")])
    assert names(registry) == {"math": ["1", "0"]}
    assert registry.by_name["math"] == adapter("math", "1")
    assert registry.versions("safety") == (adapter("safety", "5"),)


def test_a_snapshot_of_the_names_is_not_changed_by_later_changes() -> None:
    registry = Registry([adapter("math", "1")])
    before = registry.by_name
    registry.put(adapter("math", "2"))
    registry.withdraw("math")
    assert before["math"] == adapter("math", "1")


def test_a_folder_that_was_renamed_when_a_version_was_published_is_found(tmp_path: Path) -> None:
    plain = adapter("math", "1", str(tmp_path / "math"))
    versioned = tmp_path / f"math@{plain.summary.version}"
    assert [entry.folder for entry in plain.entries()] == [tmp_path / "math"]
    versioned.mkdir()
    assert [entry.folder for entry in plain.entries()] == [tmp_path / "math", versioned]
    assert {entry.name for entry in plain.entries()} == {"math"}
    alias = replace(plain, entry=Entry("prod", versioned))
    assert [entry.folder for entry in alias.entries()] == [versioned]
    assert (plain.owner, alias.owner) == ("math", "math")


def test_an_adapter_that_is_put_back_before_it_is_forgotten_stays() -> None:
    registry = Registry([adapter("math", "1")])
    gone = registry.withdraw("math")
    registry.put(adapter("math", "1"))
    registry.forget(gone[0])
    assert registry.find("1" * 64, ()) == [adapter("math", "1")]


def test_the_names_that_a_caller_may_use_are_cached_until_adapters_change() -> None:
    registry, asked = Registry([adapter("math", "1"), adapter("safety", "5")]), list[str]()

    def may_use(name: str) -> bool:
        asked.append(name)
        return name != "safety"

    assert [*registry.names_for(may_use)] == [*registry.names_for(may_use)] == ["math"]
    assert sorted(asked) == ["math", "safety"]
    registry.withdraw("math")
    assert registry.names_for(may_use) == []
    assert registry.names_for(lambda _: True) == ["safety"]


def test_the_names_of_a_limited_number_of_callers_are_cached() -> None:
    registry = Registry([adapter("math", "1")])
    for number in range(2 * MAX_CALLERS + 1):
        assert registry.names_for(lambda name, number=number: number % 2 == 0 and name == "math") == ["math"][number % 2 :]
    assert len(registry._tables.usable) <= MAX_CALLERS
