"""Options of a merge: those that do not fit the adapters are refused, and the config records the others."""

import math
from collections.abc import Sequence
from typing import Any

import pytest

from lori.adapter import Adapter
from lori.basis import Seeded
from lori.errors import AdapterError
from lori.merge import MergeMethod, MergeOptions, merge
from lori.template import Template
from tests.lori.merges import ADAPTERS, ON_SEVERAL, PRUNING, Q0, UP0, UP1, Terms, adapter, adapter_of, merged, random_b


@pytest.mark.parametrize("method", PRUNING)
@pytest.mark.parametrize("terms", ON_SEVERAL.values(), ids=ON_SEVERAL.keys())
def test_only_linear_merges_several_bases(terms: Terms, method: MergeMethod) -> None:
    with pytest.raises(AdapterError, match=rf"^{method} merges adapters on one basis, found .*seed 5, stream 0 of .*'a'"):
        merged(terms, method)


BAD: dict[str, tuple[Sequence[Adapter], Sequence[float], dict[str, Any], str]] = {
    "none": ([], [], {}, "0 weights for 0 adapters"),
    "too few weights": (ADAPTERS[:2], [1], {}, "1 weights for 2 adapters"),
    "too many weights": (ADAPTERS[:1], [1, 2], {}, "2 weights for 1 adapters"),
    "nan": (ADAPTERS[:2], [1, math.nan], {}, "the weight of 'b' is nan, expected finite"),
    "infinity": (ADAPTERS[:2], [-math.inf, 1], {}, "the weight of 'a' is -inf, expected finite"),
    "infinite together": ([ADAPTERS[0]] * 2, [1e308, 1e308], {}, "the weight of 'a' is inf, expected finite"),
    "density 0": (ADAPTERS[:1], [1], {"density": 0}, "density is 0, expected 0 < density <= 1"),
    "density above 1": (ADAPTERS[:1], [1], {"density": 1.01}, "density is 1.01, expected"),
    "density nan": (ADAPTERS[:1], [1], {"density": math.nan}, "density is nan, expected"),
    "method": (ADAPTERS[:1], [1], {"method": "svd"}, "method is 'svd', expected one of linear, ties"),
    "sign": (ADAPTERS[:1], [1], {"sign": "most"}, "sign is 'most', expected one of total, frequency"),
    "base": (
        [adapter("a"), adapter("x", base="c")],
        [1, 0],
        {},
        r"'[ax]' is of a/. \((b|c){12}\), expected a/. ",
    ),
    "shape": (
        [adapter("a"), adapter_of("b", {Q0: random_b((8, 3), 4, 0)}, shapes={Q0: (8, 5)})],
        [1, 1],
        {},
        r"of layers.0.q_proj are \(\d, 5\) in '[ab]', expected \(\d, 5\)",
    ),
    "too large": (ADAPTERS[:2], [1e39, 1], {}, "not finite in float32, in .*layers.0.q_proj"),
    "too large for fp16": (ADAPTERS[:1], [1e6], {"values": "float16"}, "not finite in float16"),
    "too large for int8": (ADAPTERS[:2], [1e308, 1e308], {"values": "int8", "method": "magnitude"}, "not finite in int8"),
}


@pytest.mark.parametrize(("adapters", "weights", "options", "message"), BAD.values(), ids=BAD.keys())
def test_adapters_that_do_not_fit_together_are_refused(
    adapters: Sequence[Adapter], weights: Sequence[float], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        merge(adapters, weights, **options)


def test_a_rank_that_no_file_may_have_is_refused() -> None:
    shapes = {"m": (2, 2)}
    wide = [
        adapter_of(f"a{stream}", {"m": random_b((2, 4096), 4, 0)}, basis=Seeded(5, stream), shapes=shapes) for stream in range(2)
    ]
    with pytest.raises(AdapterError, match=r"no adapter that can be read: .*4096"):
        merge(wide, [1, 1])


def test_the_config_records_the_origin_of_the_merge() -> None:
    one, other = adapter("a", 3, [Q0, UP0]), adapter("b", 5, [UP0, UP1])
    config = merge([one, other], [0.5, -2], "dare_ties", density=0.25, sign="frequency", seed=9).config
    record = config.lori.training["merge"]
    parents = {parent["name"]: parent["weight"] for parent in record.pop("adapters")}
    assert record == {"method": "dare_ties", "density": 0.25, "sign": "frequency", "seed": 9}
    assert parents == {"a": 0.5, "b": -2.0}
    assert set(config.target_modules) == {Q0, UP0, UP1}
    assert (config.base_model_name_or_path, config.lori.base_digest) == ("a/b", "b" * 64)
    assert merge([one, other], [0.5, -2]).version != config.lori.content_digest[:12]


@pytest.mark.parametrize(
    ("method", "used"),
    [
        ("linear", {"method"}),
        ("magnitude", {"method", "density"}),
        ("ties", {"method", "density", "sign"}),
        ("dare_linear", {"method", "density", "seed"}),
        ("dare_ties", {"method", "density", "sign", "seed"}),
    ],
)
def test_only_options_that_have_an_effect_are_recorded(method: MergeMethod, used: set[str]) -> None:
    assert set(MergeOptions(method).used) == used


TEMPLATES: list[tuple[Sequence[Template], Sequence[Template], set[Template]]] = [
    (("chat", "plain"), ("plain", "chat"), {"chat", "plain"}),
    (("chat", "plain"), ("plain",), {"plain"}),
]


@pytest.mark.parametrize(("one", "other", "shared"), TEMPLATES)
def test_a_merge_has_the_common_templates(one: Sequence[Template], other: Sequence[Template], shared: set[Template]) -> None:
    result = merge([adapter("a", templates=one), adapter("b", templates=other)], [1, 1])
    assert set(result.config.lori.templates) == shared


def test_without_a_common_template_one_must_be_named() -> None:
    # The server refuses such a request. Regression: the merge chose a template by the order of the digests.
    adapters = [adapter("a", templates=("chat",)), adapter("b", templates=("plain",))]
    with pytest.raises(AdapterError, match=r"trained on no common template \(.*a: chat.*\): say which"):
        merge(adapters, [1, 1])
    assert merge(adapters, [1, 1], templates=("plain",)).config.lori.templates == ("plain",)
