"""The tree of errors, and their messages."""

import pytest

from lori import errors
from lori.errors import (
    AdapterError,
    AdapterFormatError,
    LoriError,
    ModelError,
    TemplateError,
    UnknownAdapterError,
    UnreachableError,
)


@pytest.mark.parametrize(
    "kind", [ModelError, TemplateError, AdapterError, AdapterFormatError, UnknownAdapterError, UnreachableError]
)
def test_every_error_is_caught_by_the_root(kind: type[Exception]) -> None:
    assert issubclass(kind, LoriError)


def test_no_error_is_outside_the_tree() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) == 11
    assert all(issubclass(kind, LoriError) for kind in kinds)
    assert all(kind.__name__ in (errors.__doc__ or "") for kind in kinds)


def test_errors_about_adapters_are_adapter_errors() -> None:
    assert issubclass(AdapterFormatError, AdapterError)
    assert issubclass(UnknownAdapterError, AdapterError)
    assert not issubclass(ModelError, AdapterError)


def test_a_format_error_names_the_folder_and_every_fault() -> None:
    error = AdapterFormatError("/adapters/math", ["q_proj.mask: missing", "content digest is 1, expected 2"])
    assert error.source == "/adapters/math"
    assert error.faults == ("q_proj.mask: missing", "content digest is 1, expected 2")
    assert str(error) == (
        "/adapters/math is not a sound adapter: q_proj.mask: missing; content digest is 1, expected 2"
    )  # fmt: skip


def test_an_unknown_adapter_with_near_names() -> None:
    error = UnknownAdapterError("mth", ["math", "meth"], ["math", "meth", "safety"])
    assert (error.name, error.near) == ("mth", ("math", "meth"))
    assert str(error) == "there is no adapter 'mth': did you mean 'math' or 'meth'?"


def test_an_unknown_adapter_with_no_near_name_lists_the_known_ones() -> None:
    assert str(UnknownAdapterError("x", [], ["math", "safety"])) == "there is no adapter 'x': known are 'math', 'safety'"


def test_a_long_list_of_known_names_is_cut_and_marked() -> None:
    known = [f"a{i:02}" for i in range(25)]
    text = str(UnknownAdapterError("x", [], known))
    assert text.endswith("'a19'…")
    assert str(UnknownAdapterError("x", [], known[:20])).endswith("'a19'")


def test_an_unknown_adapter_with_a_hint_shows_only_the_hint() -> None:
    error = UnknownAdapterError("math+safety", ["math"], ["math", "safety"], "name two")
    assert str(error) == "there is no adapter 'math+safety': name two"
    assert (error.near, error.listed) == (("math",), "'math', 'safety'")


def test_an_unknown_adapter_of_an_empty_store() -> None:
    assert str(UnknownAdapterError("x", [], [])) == "there is no adapter 'x': there are none at all"
