"""What can be asked for, by name, by version and by content, while it changes."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from lori.entry import Entry
from server.engine.adapters.registry import Registered, Registry
from tests.server.registered import registered

ONE, TWO, THREE = "1" * 64, "2" * 64, "3" * 64


def names(found: Iterable[Registered]) -> list[str]:
    return [f"{of.summary.name}@{of.summary.digest[0]}" for of in found]


@pytest.fixture
def registry() -> Registry:
    """math in two versions, safety, and an alias of the old math."""
    current = [registered("math", TWO), registered("safety", THREE), registered("old", ONE, folder="math")]
    return Registry(current, [registered("math", ONE)])


def test_a_name_means_one_version_and_has_others(registry: Registry) -> None:
    assert list(registry.by_name) == ["math", "safety", "old"]
    assert registry.by_name["math"].summary.digest == TWO
    assert names(registry.versions("math")) == ["math@2", "math@1"]
    assert names(registry.versions("old")) == ["old@1"]
    assert registry.versions("nobody") == ()


def test_a_version_counts_once_however_often_it_is_given() -> None:
    registry = Registry([registered("math", ONE), registered("math", TWO)], [registered("math", TWO), registered("math", ONE)])
    assert registry.by_name["math"].summary.digest == TWO
    assert names(registry.versions("math")) == ["math@2", "math@1"]
    assert names(registry.find(ONE, ())) == ["math@1"]


def test_content_is_found_under_the_names_that_are_wanted_first(registry: Registry) -> None:
    assert names(registry.find(ONE, {"math"})) == ["math@1", "old@1"]
    assert names(registry.find(ONE, {"old"})) == ["old@1", "math@1"]
    assert sorted(names(registry.find(ONE, ()))) == ["math@1", "old@1"]
    assert registry.has(ONE)
    assert not registry.has("4" * 64)


def test_what_is_put_is_what_its_name_means_and_the_others_stay(registry: Registry) -> None:
    registry.put(registered("math", THREE))
    assert registry.by_name["math"].summary.digest == THREE
    assert names(registry.versions("math")) == ["math@3", "math@2", "math@1"]
    assert sorted(names(registry.find(THREE, ()))) == ["math@3", "safety@3"]
    registry.put(registered("math", ONE))
    assert names(registry.versions("math")) == ["math@1", "math@3", "math@2"]
    assert sorted(names(registry.find(ONE, ()))) == ["math@1", "old@1"]


def test_a_new_name_can_be_put(registry: Registry) -> None:
    registry.put(registered("law", ONE))
    assert names(registry.versions("law")) == ["law@1"]
    assert sorted(names(registry.find(ONE, ()))) == ["law@1", "math@1", "old@1"]
    assert list(registry.by_name) == ["math", "safety", "old", "law"]


def test_who_read_the_tables_before_sees_what_was(registry: Registry) -> None:
    before, versions = registry.by_name, registry.versions("math")
    registry.put(registered("law", ONE))
    registry.withdraw("math")
    assert list(before) == ["math", "safety", "old"]
    assert names(versions) == ["math@2", "math@1"]


def test_what_was_withdrawn_is_found_until_it_is_forgotten(registry: Registry) -> None:
    gone = registry.withdraw("math")
    assert names(gone) == ["math@2", "math@1"]
    assert "math" not in registry.by_name
    assert registry.versions("math") == ()
    assert not registry.has(TWO)
    assert registry.has(ONE), "under another name"
    assert names(registry.find(TWO, ())) == ["math@2"], "for requests that are under way"
    for of in gone:
        registry.forget(of)
    assert names(registry.find(ONE, ())) == ["old@1"]
    with pytest.raises(KeyError):
        registry.find(TWO, ())
    assert registry.withdraw("math") == ()


def test_forgetting_twice_is_no_harm(registry: Registry) -> None:
    for of in (*registry.withdraw("math"), registered("math", TWO), registered("nobody", "4" * 64)):
        registry.forget(of)
        registry.forget(of)
    assert names(registry.find(ONE, ())) == ["old@1"]


def test_what_is_put_back_before_it_is_forgotten_stays(registry: Registry) -> None:
    """An adapter that is removed and published again, while a request still used it, was found by nobody afterwards."""
    gone = registry.withdraw("math")
    registry.put(registered("math", TWO))
    for of in gone:
        registry.forget(of)
    assert names(registry.versions("math")) == ["math@2"]
    assert registry.has(TWO)
    assert names(registry.find(TWO, ())) == ["math@2"]
    assert names(registry.find(ONE, ())) == ["old@1"]


def test_content_that_is_put_back_from_another_folder_is_read_there(registry: Registry) -> None:
    (gone, _) = registry.withdraw("math")
    moved = registered("math", TWO, place=Path("elsewhere"))
    registry.put(moved)
    registry.forget(gone)
    assert registry.find(TWO, ()) == [moved]


def test_an_adapter_has_its_name_and_that_of_its_folder() -> None:
    assert registered("math", ONE).names == {"math"}
    assert registered("old", ONE, folder="math").names == {"old", "math"}
    as_its_maker_left_it = Registered(Entry("math", Path("store/math")), registered("math", ONE).summary)
    assert as_its_maker_left_it.names == {"math"}
