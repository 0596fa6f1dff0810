"""Checks of tenants' policies and adapter patterns against the registered adapters."""

import logging
from dataclasses import dataclass

import pytest

from server.access.caller import Caller
from server.access.keys import parse_keys
from server.access.policy import check_policies


@dataclass(frozen=True, slots=True)
class FakeAdapter:
    name: str
    digest: str


SAFETY, MATH, SECRET = FakeAdapter("safety", "1"), FakeAdapter("math", "2"), FakeAdapter("secret", "3")
KNOWN = {
    "safety": SAFETY,
    "safety@1": SAFETY,
    "safety@0": FakeAdapter("safety", "0"),
    "math": MATH,
    "math@2": MATH,
    "secret": SECRET,
    "secret@3": SECRET,
    "guard": SAFETY,
    "copy": FakeAdapter("copy", "1"),
    "hidden-copy": FakeAdapter("hidden-copy", "1"),
    "prod": MATH,
    "m-alias": SECRET,
}
NAMES = ["copy", "hidden-copy", "math", "math-2", "safety", "secret"]


def test_policies_are_checked_whole_and_unused_patterns_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    content = """
        [tenants.a]
        adapters = ["math", "nlu?", "law-*"]
        policy = { nobody = 1, safety = 1, guard = 2, "math@9" = 1 }
        [tenants.b]
        adapters = ["*"]
        policy = { safety = 1 }
        [tenants.c]
        policy = { ghost = 1 }
    """
    assert check_policies(parse_keys(content.encode(), "x"), KNOWN.get, NAMES) == [
        "tenants.a.policy: there is no adapter 'nobody'",
        "tenants.a.policy: 'safety' and 'guard' are the same adapter",
        "tenants.a.policy: there is no adapter 'math@9'",
        "tenants.c.policy: there is no adapter 'ghost'",
    ]
    assert [record.getMessage() for record in caplog.records] == [
        f"tenants.a.adapters: {pattern!r} fits no adapter" for pattern in ("nlu?", "law-*")
    ]
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    assert not check_policies(parse_keys(b"[tenants.b]\npolicy = { safety = 1 }", "x"), KNOWN.get, [])


def test_patterns_are_not_matched_with_every_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: the check of 1000 tenants and 10,000 adapters took seconds, and a removed key stayed valid meanwhile."""
    names = [f"{tenant}-{kind}" for kind in ("math", "law") for tenant in range(500)]
    content = "\n".join(f'[tenants.t{number}]\nadapters = ["{number}-*", "{number}-mat[gh]"]' for number in range(499, -1, -1))
    keys, may_use = parse_keys(content.encode(), "x"), Caller.may_use
    asked: list[str] = []

    def counted(self: Caller, name: str) -> bool:
        asked.append(name)
        return may_use(self, name)

    monkeypatch.setattr(Caller, "may_use", counted)
    assert not check_policies(keys, KNOWN.get, names)
    assert len(asked) < 4 * 500


@pytest.mark.parametrize("pattern", ["math", "ma?h", "m*", "*h", "[lm]ath", "math-?", "[!a]ath", "ma*-2", "secre[t]"])
def test_a_pattern_matches_a_name_wherever_its_wildcard_is(pattern: str, caplog: pytest.LogCaptureFixture) -> None:
    check_policies(parse_keys(f'[tenants.a]\nadapters = ["{pattern}"]'.encode(), "x"), KNOWN.get, reversed(NAMES))
    assert not caplog.records
