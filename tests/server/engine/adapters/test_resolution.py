"""Resolution of adapter references: the adapter that a caller's reference means, and the errors where it means none."""

from dataclasses import replace

import pytest

from lori.errors import UnknownAdapterError
from server.engine.adapters.registry import (
    AmbiguousVersionError,
    MayUse,
    PolicyError,
    Registry,
    candidates,
    check_registered,
    resolve,
)
from server.engine.request import AdapterTerm
from tests.server.registered import registered
from tests.server.rig import request

NEW, OLD, OTHER = "ab12" + "0" * 60, "ab34" + "0" * 60, "ff" * 32
SECRET = "c" * 64


@pytest.fixture
def registry() -> Registry:
    """Return math in three versions, two of which begin alike, safety, an alias of the old math, and a secret."""
    current = [registered("math", NEW), registered("safety", OTHER), registered("old", OLD, folder="math")]
    versions = [registered("math", OLD), registered("math", OTHER)]
    return Registry([*current, registered("secret", SECRET)], versions)


def anybody(_: str) -> bool:
    return True


def public(name: str) -> bool:
    return name != "secret"


@pytest.mark.parametrize(
    ("reference", "name", "digest"),
    [
        ("math", "math", NEW),
        ("old", "old", OLD),
        (f"math@{NEW[:12]}", "math", NEW),
        (f"math@{OLD[:12]}", "math", OLD),
        ("math@ab1", "math", NEW),
        ("math@ab3", "math", OLD),
        ("math@f", "math", OTHER),
        ("old@a", "old", OLD),
        ("safety@ffffffffffff", "safety", OTHER),
    ],
)
def test_a_name_means_its_current_version_and_digits_mean_the_version_that_they_begin(
    registry: Registry, reference: str, name: str, digest: str
) -> None:
    adapter = resolve(registry, reference, anybody)
    assert (adapter.summary.name, adapter.summary.digest) == (name, digest)


@pytest.mark.parametrize("reference", ["math@a", "math@ab"])
def test_the_error_for_ambiguous_digits_names_all_their_versions(registry: Registry, reference: str) -> None:
    with pytest.raises(AmbiguousVersionError) as caught:
        resolve(registry, reference, anybody)
    assert str(caught.value) == f"'{reference}' could be math@{NEW[:12]} or math@{OLD[:12]}"


@pytest.mark.parametrize(
    "reference",
    [
        "math@",
        "math@b",
        f"math@{NEW[:13]}",
        "math@AB12",
        "math@ab1@2",
        "math@@ab1",
        "@ab1",
        "@",
        "",
        "math ",
        "Math",
        "../store/math",
        f"{NEW}",
        "old@f",
        "nobody@ab1",
        "math@*",
    ],
)
def test_a_reference_to_no_adapter_is_unknown(registry: Registry, reference: str) -> None:
    with pytest.raises(UnknownAdapterError) as caught:
        resolve(registry, reference, anybody)
    assert caught.value.name == reference


@pytest.mark.parametrize("reference", ["secret", "secret@c", "secret@cc", "secrets", "secret@", "secret@d"])
def test_a_forbidden_adapter_is_as_unknown_as_a_missing_one(registry: Registry, reference: str) -> None:
    with pytest.raises(UnknownAdapterError) as forbidden:
        resolve(registry, reference, public)
    registry.withdraw("secret")
    with pytest.raises(UnknownAdapterError) as missing:
        resolve(registry, reference, public)
    assert str(forbidden.value) == str(missing.value)
    assert forbidden.value.near == missing.value.near


def test_the_versions_of_a_forbidden_adapter_are_not_disclosed(registry: Registry) -> None:
    with pytest.raises(UnknownAdapterError) as caught:
        resolve(registry, "math@ab", lambda name: name == "safety")
    assert str(caught.value) == "there is no adapter 'math@ab': known are 'safety'"


def test_only_names_that_may_be_used_are_suggested(registry: Registry) -> None:
    def message(reference: str, may_use: MayUse) -> str:
        with pytest.raises(UnknownAdapterError) as caught:
            resolve(registry, reference, may_use)
        return str(caught.value)

    assert message("secrets", anybody) == "there is no adapter 'secrets': did you mean 'secret'?"
    assert message("secrets", public) == "there is no adapter 'secrets': known are 'math', 'old', 'safety'"
    assert message("math", lambda _: False) == "there is no adapter 'math': there are none at all"


def test_a_reference_may_mean_several_versions_or_none(registry: Registry) -> None:
    def meant(reference: str) -> list[str]:
        return [version.summary.digest for version in candidates(registry, reference)]

    assert meant("math") == [NEW]
    assert meant("math@ab") == [NEW, OLD]
    assert meant("secret@c") == [SECRET]
    assert meant("math@e") == meant("nobody") == meant("math@") == meant("") == []


def test_an_adapter_that_was_withdrawn_since_admission_is_unknown(registry: Registry) -> None:
    admitted = replace(request(), terms=(AdapterTerm("safety", OTHER, 1.0), AdapterTerm("math", OLD, 1.0)))
    check_registered(registry, admitted, anybody)
    registry.withdraw("math")  # 'old' has the same content, but another name
    with pytest.raises(UnknownAdapterError) as caught:
        check_registered(registry, admitted, public)
    assert str(caught.value) == f"there is no adapter 'math@{OLD[:12]}': known are 'old', 'safety'"


def test_a_policy_that_was_withdrawn_since_admission_is_the_operator_s_failure(registry: Registry) -> None:
    admitted = replace(request(), policy=(AdapterTerm("secret", SECRET, 1.0),))
    check_registered(registry, admitted, public)
    registry.withdraw("secret")
    with pytest.raises(PolicyError) as caught:
        check_registered(registry, admitted, public)
    assert "secret" not in str(caught.value)
