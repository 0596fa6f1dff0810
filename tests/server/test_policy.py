"""What a caller may name, and what the operator adds to it."""

import logging
from dataclasses import dataclass

import pytest

from lori.errors import UnknownAdapterError
from server.access.caller import Caller
from server.access.keys import parse_keys
from server.access.policy import NamesPolicyError, PolicyError, check_policies, choose, find_usable


@dataclass(frozen=True, slots=True)
class Found:
    name: str
    digest: str


SAFETY, MATH, SECRET = Found("safety", "1"), Found("math", "2"), Found("secret", "3")
KNOWN = {
    "safety": SAFETY,
    "safety@1": SAFETY,
    "safety@0": Found("safety", "0"),
    "math": MATH,
    "math@2": MATH,
    "secret": SECRET,
    "secret@3": SECRET,
    "guard": SAFETY,
    "copy": Found("copy", "1"),
    "hidden-copy": Found("hidden-copy", "1"),
    "prod": MATH,
    "m-alias": SECRET,
}
NAMES = ["copy", "hidden-copy", "math", "math-2", "safety", "secret"]
ACME = Caller(tenant="acme", allowed=("m*", "copy"), policy=(("safety@1", 0.5),))


def test_the_caller_has_what_it_asks_for_and_what_is_added() -> None:
    chosen, policy = choose(ACME, ["math@2"], KNOWN.get, NAMES)
    assert chosen == [MATH]
    assert policy == [(SAFETY, 0.5)]
    assert choose(ACME, [], KNOWN.get, NAMES) == ([], [(SAFETY, 0.5)])
    assert choose(Caller(), ["secret", "prod"], KNOWN.get, NAMES) == ([SECRET, MATH], [])


def test_an_alias_is_as_good_as_the_adapter_that_it_means() -> None:
    assert find_usable(ACME, "prod", KNOWN.get, NAMES) == MATH
    with pytest.raises(UnknownAdapterError):
        find_usable(ACME, "m-alias", KNOWN.get, NAMES)


@pytest.mark.parametrize("reference", ["safety", "safety@1", "safety@0", "guard", "copy"])
def test_an_adapter_of_the_policy_cannot_be_named(reference: str) -> None:
    with pytest.raises(NamesPolicyError, match="which the operator adds to every request of 'acme'") as caught:
        choose(ACME, ["math", reference], KNOWN.get, NAMES)
    assert f"names '{reference}', " in str(caught.value)


def refusal(caller: Caller, reference: str, names: list[str]) -> tuple[type[Exception], str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011  # which one it is, is compared
        choose(caller, [reference], {name: KNOWN[name] for name in KNOWN if KNOWN[name].name in names}.get, names)
    return type(caught.value), str(caught.value)


@pytest.mark.parametrize("reference", ["secret", "secret@3", "m-alias", "hidden-copy"])
def test_what_may_not_be_used_is_not_there(reference: str) -> None:
    without = [name for name in NAMES if name not in ("secret", "hidden-copy")]
    assert refusal(ACME, reference, NAMES) == refusal(ACME, reference, without)
    kind, said = refusal(ACME, reference, NAMES)
    assert kind is UnknownAdapterError
    assert "secret" not in said.replace(f"'{reference}'", "")
    assert "hidden" not in said.replace(f"'{reference}'", "")


def test_suggestions_are_names_that_may_be_used() -> None:
    with pytest.raises(UnknownAdapterError) as caught:
        choose(ACME, ["secrets"], KNOWN.get, NAMES)
    assert str(caught.value) == "there is no adapter 'secrets': known are 'copy', 'math', 'math-2'"
    with pytest.raises(UnknownAdapterError, match="did you mean 'math' or 'math-2'"):
        choose(ACME, ["mat"], KNOWN.get, NAMES)
    with pytest.raises(UnknownAdapterError, match="there are none at all"):
        find_usable(Caller(allowed=()), "math", KNOWN.get, NAMES)


def test_unknown_and_forbidden_are_the_same_work() -> None:
    def work(reference: str) -> list[tuple[str, ...]]:
        done: list[tuple[str, ...]] = []

        class Watched(Caller):
            def may_use(self, name: str) -> bool:
                done.append(("may_use", "asked" if name == reference else name))
                return super().may_use(name)

        def find(name: str) -> Found | None:
            done.append(("find", "asked" if name == reference else name))
            return KNOWN.get(name)

        with pytest.raises(UnknownAdapterError):
            find_usable(Watched(allowed=("m*",)), reference, find, [n for n in NAMES if n != "secret"])
        return done

    assert work("secret") == work("nobody")
    assert len(work("secret")) == 1 + 1 + len(NAMES) - 1


def test_a_request_is_not_served_without_its_policy(caplog: pytest.LogCaptureFixture) -> None:
    without = {name: found for name, found in KNOWN.items() if found is not SAFETY}
    for asked in ([], ["math"], ["nobody"]):
        with pytest.raises(PolicyError, match="not served without them"):
            choose(ACME, asked, without.get, NAMES)
    assert "requests of tenant 'acme' fail: its policy names safety@1, which is not there" in caplog.text


def test_policies_are_checked_whole_and_idle_patterns_are_said(caplog: pytest.LogCaptureFixture) -> None:
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
