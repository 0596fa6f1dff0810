"""PEFT's config: patterns have the same meaning as in PEFT, and no field that changes an adapter is ignored."""

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
from peft.utils.other import get_pattern_key

from lori.config import CONFIG_FILE
from lori.peft.config import PeftConfig, exact_pattern, match_pattern
from lori.peft.importer import read_peft_config

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.mlp.down_proj",
    "other.model.layers.1.self_attn.q_proj",
    "q_proj",
]
PATTERNS = [
    ["q_proj"],
    ["proj"],
    [r".*q_proj"],
    ["layers.1.self_attn.q_proj"],
    ["^model.layers.1.self_attn.q_proj"],
    [r"layers\.\d\.self_attn\.q_proj"],
    ["q_proj|down_proj"],
    ["self_attn.q_proj", "model.layers.1.self_attn.q_proj"],
    ["model.layers.1.self_attn.q_proj", "q_proj"],
    ["^q_proj", "mlp.*"],
    ["model.layers.1"],
    [],
]


def read(folder: Path, **changes: Any) -> tuple[PeftConfig | None, list[str]]:
    faults: list[str] = []
    (folder / CONFIG_FILE).write_text(json.dumps(PLAIN | changes))
    return read_peft_config(folder, faults), faults


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("keys", PATTERNS, ids=str)
def test_a_pattern_matches_the_modules_that_it_matches_in_peft(keys: list[str], module: str) -> None:
    pattern = {key: i for i, key in enumerate(keys)}
    assert match_pattern(pattern, module, -1) == pattern.get(get_pattern_key(list(pattern), module), -1)


def test_a_name_that_its_own_pattern_does_not_match_still_counts_as_in_peft() -> None:
    module = "blocks[0]"
    assert get_pattern_key([module], module) == module
    assert match_pattern({module: 3}, module, -1) == 3


@pytest.mark.parametrize("module", MODULES)
def test_an_exact_pattern_matches_its_module_alone(module: str) -> None:
    others = [*MODULES, "model_layers.1.self_attn.q_proj", "model.layers.1.self_attn.q_proj_2"]
    assert [name for name in others if get_pattern_key([exact_pattern(module)], name) == exact_pattern(module)] == [module]


@pytest.mark.parametrize("use_rslora", [False, True])
def test_alpha_over_rank_is_the_scale_of_peft(tmp_path: Path, use_rslora: bool) -> None:
    config, faults = read(tmp_path, use_rslora=use_rslora, rank_pattern={"down_proj": 9}, alpha_pattern={"layers.1.*": 6.5})
    assert faults == []
    assert config is not None
    expected = {MODULES[0]: (4, 8), MODULES[1]: (4, 6.5), MODULES[3]: (9, 6.5)}
    for module, (rank, alpha) in expected.items():
        assert config.rank_of(module) == rank
        scale = alpha / math.sqrt(rank) if use_rslora else alpha / rank
        assert config.alpha_of(module) / rank == pytest.approx(scale, rel=1e-15)


def test_every_default_of_peft_can_be_read(tmp_path: Path) -> None:
    document = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]).to_dict()
    config, faults = read(tmp_path, **{key: list(value) if isinstance(value, set) else value for key, value in document.items()})
    assert faults == []
    assert config is not None
    assert (config.r, config.lora_alpha) == (4, 8)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_dropout": 0.1, "inference_mode": False, "revision": "main", "task_type": None, "target_modules": "all-linear"},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers", "exclude_modules": ["k_proj"]},
        {"rank_pattern": None, "alpha_pattern": None, "modules_to_save": [], "future_field": False},
        {"megatron_core": "megatron.core", "qalora_group_size": 16, "loftq_config": {"bits": 4}},
        *({"init_lora_weights": init} for init in (True, False, None, "gaussian", "orthogonal", "eva", "mica")),
    ],
    ids=str,
)
def test_fields_that_change_nothing_are_no_faults(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert read(tmp_path, **changes)[1] == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("modules_to_save", ["lm_head"]),
        ("target_parameters", ["experts.up_proj"]),
        ("trainable_token_indices", [1, 2]),
        ("layer_replication", [[0, 1], [0, 2]]),
        ("alora_invocation_tokens", [5, 6]),
        ("use_qalora", True),
        ("megatron_config", {"tensor_model_parallel_size": 2}),
        ("arrow_config", {}),
        ("kasa_config", {}),
        ("use_bdlora", {}),
        ("monteclora_config", {}),
        ("velora_config", {}),
        ("future_field", "on"),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("peft_type", "IA3"),
        ("peft_type", "LORI"),
        ("r", 0),
        ("r", "many"),
        ("lora_alpha", 0),
        ("lora_alpha", None),
        ("lora_alpha", math.inf),
        ("lora_alpha", math.nan),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj(": 2}),
        ("alpha_pattern", {"*": 2}),
        *(("init_lora_weights", init) for init in ("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga")),
        ("init_lora_weights", "another"),
    ],
)
def test_an_unsupported_field_is_a_fault_that_names_field_and_value(tmp_path: Path, field: str, value: object) -> None:
    [fault] = read(tmp_path, **{field: value})[1]
    assert fault.startswith(f"{CONFIG_FILE}: {field}")
    named = next(iter(value)) if isinstance(value, dict) and value and field != "megatron_config" else value
    assert str(named).strip("[]{}'") in fault


@pytest.mark.parametrize("field", ["peft_type", "r", "lora_alpha"])
def test_a_missing_field_is_a_fault(tmp_path: Path, field: str) -> None:
    (tmp_path / CONFIG_FILE).write_text(json.dumps({key: value for key, value in PLAIN.items() if key != field}))
    faults: list[str] = []
    assert read_peft_config(tmp_path, faults) is None
    assert [fault.partition(": F")[0] for fault in faults] == [f"{CONFIG_FILE}: {field}"]


def test_all_faults_are_found_at_once(tmp_path: Path) -> None:
    config, faults = read(tmp_path, use_dora=True, r=-1, bias="all", init_lora_weights="pissa", fan_in_fan_out=True)
    assert config is None
    assert {fault.split()[1].rstrip(":") for fault in faults} == {"use_dora", "fan_in_fan_out", "r", "bias", "init_lora_weights"}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b"[" * 100_000], ids=lambda c: repr(c[:5]))
def test_a_config_that_is_no_json_object_is_a_fault(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CONFIG_FILE).write_bytes(content)
    faults: list[str] = []
    assert read_peft_config(tmp_path, faults) is None
    [fault] = faults
    assert fault.startswith(f"{CONFIG_FILE}: JSON: ")


def test_a_missing_config_is_a_fault(tmp_path: Path) -> None:
    faults: list[str] = []
    assert read_peft_config(tmp_path, faults) is None
    assert faults == [f"{CONFIG_FILE} cannot be read: No such file or directory"]


@pytest.mark.parametrize(
    "key",
    [
        "([a-z._0-9]*)*!",
        "(a+)+b",
        ".*a" * 9,
        "(" * 2000 + ")" * 2000,
        "a{1,99999999999}",
        "x" * 9999,
        "a(?=b)",
        "",
        "(.|.)" * 30 + "X",
        "a|" * 99,
    ],
    ids=["nested", "nested plus", "many", "deep", "count", "long", "lookahead", "empty", "alternatives", "many alternatives"],
)
def test_a_pattern_that_could_take_for_ever_is_refused(tmp_path: Path, key: str) -> None:
    # Regression: the first one hung, and the fourth and fifth raised unhandled errors.
    for field in ("alpha_pattern", "rank_pattern"):
        config, faults = read(tmp_path, **{field: {key: 4}})
        assert config is None
        assert field in faults[0]


def test_more_patterns_than_a_model_has_modules_are_refused(tmp_path: Path) -> None:
    """Patterns that are slow in total are refused as well."""
    for patterns in ({f"q{i}": 4 for i in range(5000)}, {f".*q{i}": 4 for i in range(300)}):
        config, faults = read(tmp_path, rank_pattern=patterns)
        assert config is None
        assert f"{len(patterns)} patterns of module names" in faults[0]


def test_an_enormous_alpha_is_refused(tmp_path: Path) -> None:
    config, faults = read(tmp_path, lora_alpha=1e300)
    assert config is None
    assert "lora_alpha" in faults[0]
