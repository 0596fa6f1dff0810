"""adapter_config.json: valid and invalid fields."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from lori.basis import Seeded
from lori.config import AdapterConfig, compact_shapes, target_names
from tests.lori.adapters import make_config

SEEDED = {"generator": "philox-u24-1", "seed": 0, "stream": 0}


def document(changes: dict[str, Any], section: dict[str, Any]) -> str:
    raw = json.loads(make_config().model_dump_json())
    return json.dumps(raw | changes | {"lori": raw["lori"] | section})


def test_scale_is_alpha_over_r() -> None:
    assert make_config(rank=8, alpha=20.0).scale == 2.5


def test_a_config_comes_back_from_json() -> None:
    config = make_config(alpha=0.1 + 0.2, merge_weights={"math": (0.7, 1.0)}, metrics={"loss": 1e-7}, training={"seed": 1})
    assert AdapterConfig.model_validate_json(config.model_dump_json()) == config


def test_the_basis_is_the_one_that_the_fields_describe() -> None:
    assert make_config(basis=Seeded(seed=2**63 - 1, stream=3)).lori.basis.basis() == Seeded(seed=2**63 - 1, stream=3)


def test_a_config_uses_pefts_field_names() -> None:
    written = json.loads(make_config().model_dump_json())
    assert written["peft_type"] == "LORI"
    assert written["task_type"] == "CAUSAL_LM"
    assert written["target_modules"] == ["q_proj", "up_proj"]
    assert written["lori"]["format_version"] == 2
    assert written["lori"]["basis"] == {"generator": "philox-u24-1", "seed": 5, "stream": 1}


@pytest.mark.parametrize(
    ("changes", "section", "location"),
    [
        ({"peft_type": "LORA"}, {}, "peft_type"),
        ({"rank": 3}, {}, "rank"),
        ({"r": 0}, {}, "r"),
        ({"r": 2.5}, {}, "r"),
        ({"lora_alpha": 0}, {}, "lora_alpha"),
        ({"lora_alpha": -1.0}, {}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, {}, "lora_alpha"),
        # Regression: it was read as infinity, and every delta of such an adapter was NaN.
        ({"lora_alpha": float("inf")}, {}, "lora_alpha"),
        ({"target_modules": []}, {}, "target_modules"),
        ({"bias": "all"}, {}, "bias"),
        ({"task_type": "SEQ_CLS"}, {}, "task_type"),
        ({}, {"format_version": 1}, "lori.format_version"),
        ({}, {"sparsity": 1.1}, "lori.sparsity"),
        ({}, {"sparsity": -0.1}, "lori.sparsity"),
        ({}, {"templates": []}, "lori.templates"),
        ({}, {"templates": ["chat", "chatml"]}, "lori.templates.1"),
        ({}, {"basis": SEEDED | {"seed": -1}}, "lori.basis.philox-u24-1.seed"),
        ({}, {"basis": SEEDED | {"stream": 2**63}}, "lori.basis.philox-u24-1.stream"),
        ({}, {"basis": SEEDED | {"generator": "torch"}}, "lori.basis"),
        ({}, {"basis": {"seed": 0, "stream": 0}}, "lori.basis"),
        ({}, {"basis": SEEDED | {"sed": 0}}, "lori.basis.philox-u24-1.sed"),
        ({}, {"basis": {"generator": "explicit", "digest": "b"}}, "lori.basis.explicit.digest"),
        ({}, {"values": "float8"}, "lori.values"),
        ({}, {"shapes": {}}, "lori.shapes"),
        ({}, {"shapes": {"q_proj": [9, 0]}}, "lori.shapes.q_proj.1"),
        ({"r": 4097}, {}, "r"),
        ({"rank_pattern": {"layers.0.q_proj": 0}}, {}, "rank_pattern.layers.0.q_proj"),
        ({"alpha_pattern": {"layers.0.q_proj": 0.0}}, {}, "alpha_pattern.layers.0.q_proj"),
        ({"r": 33}, {"shapes": {"q_proj": [2**24, 5]}}, ""),
        ({}, {"basis_digest": "B" * 64}, "lori.basis_digest"),
        ({}, {"base_digest": "b" * 63}, "lori.base_digest"),
        ({}, {"content_digest": "b" * 65}, "lori.content_digest"),
        ({}, {"metric": {}}, "lori.metric"),
    ],
)
def test_an_invalid_field_is_named(changes: dict[str, Any], section: dict[str, Any], location: str) -> None:
    with pytest.raises(ValidationError) as caught:
        AdapterConfig.model_validate_json(document(changes, section))
    assert [".".join(map(str, error["loc"])) for error in caught.value.errors()] == [location]


@pytest.mark.parametrize("field", ["base_model_name_or_path", "r", "lora_alpha", "target_modules", "lori"])
def test_a_field_without_a_default_is_required(field: str) -> None:
    raw = json.loads(make_config().model_dump_json())
    del raw[field]
    with pytest.raises(ValidationError, match=f"{field}\n  Field required"):
        AdapterConfig.model_validate(raw)


def test_a_config_does_not_change() -> None:
    config = make_config()
    with pytest.raises(ValidationError, match="frozen"):
        config.r = 7  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.lori.sparsity = 0.0  # type: ignore[misc]


def test_a_module_has_the_rank_and_alpha_of_its_patterns() -> None:
    raw = json.loads(document({"rank_pattern": {"layers.0.q_proj": 8}, "alpha_pattern": {"layers.1.q_proj": 9.0}}, {}))
    config = AdapterConfig.model_validate(raw)
    assert [config.rank_of(f"layers.{i}.q_proj") for i in range(3)] == [8, 3, 3]
    assert [config.scale_of(f"layers.{i}.q_proj") for i in range(3)] == [6 / 8, 9 / 3, 6 / 3]


def test_shapes_are_listed_once_and_exceptions_by_full_name() -> None:
    shapes = {f"layers.{i}.q_proj": (8, 4) for i in range(3)} | {"layers.1.q_proj": (8, 6), "lm.up_proj": (2, 3)}
    compact = compact_shapes(shapes)
    assert compact == {"q_proj": (8, 4), "layers.1.q_proj": (8, 6), "up_proj": (2, 3)}
    config = AdapterConfig.model_validate_json(document({}, {"shapes": compact}))
    assert {module: config.shape_of(module) for module in shapes} == shapes
    assert config.shape_of("layers.0.k_proj") is None


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (["layers.0.q_proj", "layers.1.q_proj"], ("q_proj",)),
        (["layers.0.q_proj"], ("layers.0.q_proj",)),
        (["layers.0.q_proj", "layers.1.q_proj", "layers.1.o_proj"], ("layers.0.q_proj", "layers.1.q_proj", "layers.1.o_proj")),
    ],
)
def test_targets_are_last_name_parts_only_if_every_such_module_is_a_target(modules: list[str], expected: tuple[str, ...]) -> None:
    base = [f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "o_proj")]
    names = target_names(dict.fromkeys(modules), dict.fromkeys(base))
    assert names == expected
    config = make_config().model_copy(update={"target_modules": names})
    assert [module for module in base if config.is_target(module)] == [module for module in base if module in modules]
