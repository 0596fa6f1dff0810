"""Errors for unknown adapter names with similar names, and the other names of a base model."""

import random
from pathlib import Path

import pytest

from lori.errors import AdapterError
from lori.names import EMBEDDED_HUB_ID, base_aliases, check_name, is_name, is_reference, near_names, unknown_adapter

KNOWN = ["intent", "math", "safety"]


@pytest.mark.parametrize("name", ["math", "a", "a.b-c_1", "autos", "auto-1", "x" * 64])
def test_names_and_their_versions(name: str) -> None:
    check_name(name)
    assert is_name(name)
    assert is_reference(name)
    assert is_reference(f"{name}@0123")
    assert not is_reference(f"{name}@")
    assert not is_reference(f"{name}@xyz")


@pytest.mark.parametrize("name", ["", "Math", "../math", "-math", "x" * 65, "math@1", "auto"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(AdapterError, match="is reserved: requests for it" if name == "auto" else "must match"):
        check_name(name)
    assert not is_name(name)
    assert not is_reference(f"{name}@0123")


def test_near_names_are_listed_nearest_first() -> None:
    error = unknown_adapter("saftey", iter(["math", "safety", "safe", "nlu"]))
    assert error.name == "saftey"
    assert error.near == ("safety", "safe")
    assert str(error) == "there is no adapter 'saftey': did you mean 'safety' or 'safe'?"


def test_known_names_are_listed_in_order_if_none_is_near() -> None:
    assert str(unknown_adapter("zzz", ["math", "code"])) == "there is no adapter 'zzz': known are 'code', 'math'"


@pytest.mark.parametrize(
    ("reference", "near"),
    [
        ("maths", ("math",)),
        ("safty", ("safety",)),
        ("intents", ("intent",)),
        ("../math", ("math",)),
        ("MATH", ("math",)),
        ("Math@0123456789ab", ("math",)),
        ("nobody", ()),
        ("x" * 256, ()),
        ("", ()),
        ("@", ()),
        ("\ud800", ()),
        ("m\0ath", ("math",)),
    ],
)
def test_names_near_a_mistyped_reference_are_suggested(reference: str, near: tuple[str, ...]) -> None:
    error = unknown_adapter(reference, KNOWN)
    assert error.near == near
    assert repr(reference) in str(error)


def test_at_most_three_near_names_are_listed_and_ties_are_sorted() -> None:
    known = [f"math{i}" for i in range(9)]
    random.Random(1).shuffle(known)
    assert unknown_adapter("math", known).near == ("math0", "math1", "math2")


def test_a_base_model_s_other_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert base_aliases(None) == {EMBEDDED_HUB_ID} == {"HuggingFaceTB/SmolLM2-135M-Instruct"}
    assert base_aliases("someone/model") == frozenset()
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    assert base_aliases(f"{tmp_path}/model/") == {f"{tmp_path}/model"}
    monkeypatch.chdir(tmp_path)
    assert base_aliases("./link") == {"./link", f"{tmp_path}/link", f"{tmp_path}/model"}


def test_thousands_of_names_are_searched_by_one_call_and_three_are_listed() -> None:
    known = [f"adapter-{number:05}" for number in range(10_000)]
    assert near_names("adapter-0420", known) == ["adapter-00420", "adapter-01420", "adapter-02420"]
    assert near_names("m" * 4096, known) == []
