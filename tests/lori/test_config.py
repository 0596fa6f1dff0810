"""adapter_config.json: what it admits and what it refuses."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from lori.basis import Seeded
from lori.config import AdapterConfig
from tests.lori.adapters import make_config


def document(changes: dict[str, Any], section: dict[str, Any]) -> str:
    raw = json.loads(make_config().model_dump_json())
    return json.dumps(raw | changes | {"lori": raw["lori"] | section})


def test_scale_is_alpha_over_r() -> None:
    assert make_config(rank=8, alpha=20.0).scale == 2.5


def test_a_config_comes_back_from_json() -> None:
    config = make_config(alpha=0.1 + 0.2, merge_weights={"math": (0.7, 1.0)}, metrics={"loss": 1e-7}, training={"seed": 1})
    assert AdapterConfig.model_validate_json(config.model_dump_json()) == config


def test_the_basis_is_what_the_fields_say() -> None:
    assert make_config(basis=Seeded(seed=2**63 - 1, stream=3)).lori.basis.basis() == Seeded(seed=2**63 - 1, stream=3)


def test_a_file_says_what_it_is_in_peft_s_words() -> None:
    written = json.loads(make_config().model_dump_json())
    assert written["peft_type"] == "LORI"
    assert written["task_type"] == "CAUSAL_LM"
    assert written["target_modules"] == ["q_proj", "up_proj"]
    assert written["lori"]["format_version"] == 1
    assert written["lori"]["basis"] == {"generator": "philox-u24-1", "seed": 5, "stream": 1}


@pytest.mark.parametrize(
    ("changes", "section", "where"),
    [
        ({"peft_type": "LORA"}, {}, "peft_type"),
        ({"rank": 3}, {}, "rank"),
        ({"r": 0}, {}, "r"),
        ({"r": 2.5}, {}, "r"),
        ({"lora_alpha": 0}, {}, "lora_alpha"),
        ({"lora_alpha": -1.0}, {}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, {}, "lora_alpha"),
        # Was read as infinity: every delta of such an adapter is not a number.
        ({"lora_alpha": float("inf")}, {}, "lora_alpha"),
        ({"target_modules": []}, {}, "target_modules"),
        ({"bias": "all"}, {}, "bias"),
        ({"task_type": "SEQ_CLS"}, {}, "task_type"),
        ({}, {"format_version": 2}, "lori.format_version"),
        ({}, {"sparsity": 1.0}, "lori.sparsity"),
        ({}, {"sparsity": -0.1}, "lori.sparsity"),
        ({}, {"templates": []}, "lori.templates"),
        ({}, {"templates": ["chat", "chatml"]}, "lori.templates.1"),
        ({}, {"basis": {"seed": -1, "stream": 0}}, "lori.basis.seed"),
        ({}, {"basis": {"seed": 0, "stream": 2**63}}, "lori.basis.stream"),
        ({}, {"basis": {"seed": 0, "stream": 0, "generator": "torch"}}, "lori.basis.generator"),
        ({}, {"basis": {"seed": 0, "stream": 0, "sed": 0}}, "lori.basis.sed"),
        ({}, {"basis_digest": "B" * 64}, "lori.basis_digest"),
        ({}, {"base_digest": "b" * 63}, "lori.base_digest"),
        ({}, {"content_digest": "b" * 65}, "lori.content_digest"),
        ({}, {"metric": {}}, "lori.metric"),
    ],
)
def test_a_field_that_is_not_sound_is_named(changes: dict[str, Any], section: dict[str, Any], where: str) -> None:
    with pytest.raises(ValidationError) as caught:
        AdapterConfig.model_validate_json(document(changes, section))
    assert [".".join(map(str, error["loc"])) for error in caught.value.errors()] == [where]


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
