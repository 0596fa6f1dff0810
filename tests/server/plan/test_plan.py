"""Replicas, budgets and flags of a plan, computed by hand."""

import math
import shlex
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from server.cluster.settings import ClusterSettings
from server.plan.config import PlanConfig
from server.plan.memory import GIB, AdapterSizes, ModelSizes
from server.plan.plan import Plan, PlanError, assumptions, make_plan, sizes
from server.plan.speed import HELD_FACTOR, RESERVED_FACTOR, Speed
from server.settings import Settings

MODEL = ModelSizes("tiny", weights=GIB, kv_token=1024, max_context=512, num_ids=257, shapes={"a.q_proj": (64, 48)})
ADAPTER = AdapterSizes(num_kept=100, resident=2**20, on_disk=2**19, dense=2**23)


def planned(**settings: Any) -> Plan:
    config = configured(**settings)
    return make_plan(config, MODEL, ADAPTER, Speed(config.single_tokens_per_s, config.tokens_per_s or 0, config.users))


def configured(**settings: Any) -> PlanConfig:
    defaults = {
        "adapters": 10_000,
        "rps": 10.0,
        "tokens_per_s": 1000.0,
        "completion_tokens": 100,
        "ratio": 0.8,
        "overhead_gib": 0.5,
    }
    return PlanConfig(**(defaults | settings))


def test_replicas_follow_from_tokens_utilisation_and_spares() -> None:
    plan = planned(rps=10, utilisation=0.5)
    assert plan.requests_per_s == 8
    assert (plan.num_needed, plan.num_replicas) == (3, 4)  # 10 requests/s, and a replica is to answer 4
    assert planned(rps=8, utilisation=0.5, spare=0).num_replicas == 2
    assert planned(rps=8.01, utilisation=0.5, spare=2).num_replicas == 5


def test_the_kv_cache_holds_a_full_batch_in_whole_blocks() -> None:
    plan = planned(max_batch=10, prompt_tokens=50, completion_tokens=7, users=10)
    assert plan.num_kv_tokens == 10 * 64
    assert plan.memory.kv_cache == 10 * 64 * 1024


def test_a_small_batch_is_planned_with_its_own_speed() -> None:
    """Regression: the plan used the tokens a second of all users, however few could run together."""
    few = planned(max_batch=4, single_tokens_per_s=100.0)
    assert few.requests_per_s < planned().requests_per_s / 2
    assert few.num_needed > planned().num_needed
    text = "\n".join(assumptions(configured(max_batch=4, single_tokens_per_s=100.0), few))
    assert f"so {few.requests_per_s * 100 / 0.8:.3g} for the 4 that run together" in text
    assert "that run together" not in "\n".join(assumptions(configured(), planned()))


def test_a_plan_names_the_requests_that_its_kv_cache_has_no_room_for() -> None:
    settings = {"max_batch": 2, "single_tokens_per_s": 100.0, "completion_tokens": 60}
    few = planned(**settings)
    assert "refuses a request of more than these 320 tokens" in "\n".join(assumptions(configured(**settings), few))
    assert few.num_kv_tokens == 320 < MODEL.max_context
    assert "refuses" not in "\n".join(assumptions(configured(), planned()))


def test_adapters_fill_the_rest_of_the_memory() -> None:
    plan = planned(memory_gib=4)
    each = math.ceil(HELD_FACTOR * ADAPTER.resident)
    assert plan.memory.total <= 4 * GIB < plan.memory.total + each
    assert plan.memory.fixed + plan.num_resident * each == plan.memory.total
    assert plan.memory.process == GIB // 2


def test_no_more_adapters_are_resident_than_exist_or_are_allowed() -> None:
    assert planned(memory_gib=4, adapters=70).num_resident == 70
    assert planned(memory_gib=4, max_resident=100).num_resident == 100
    assert planned().num_resident == Settings.model_fields["max_resident"].default


def test_too_little_memory_is_refused_with_an_amount_that_suffices() -> None:
    with pytest.raises(
        PlanError, match=r"--memory-gib 1\.55 holds \d+ adapters .* expected at least 64.*: ([\d.]+) would do"
    ) as caught:
        planned(memory_gib=1.55)
    enough = float(str(caught.value).split(": ")[1].split()[0])
    assert planned(memory_gib=enough).num_resident >= 64


def test_fewer_slots_than_a_batch_may_use_are_refused() -> None:
    with pytest.raises(PlanError, match="--max-resident is 63, expected at least 64"):
        planned(max_resident=63)
    assert planned(max_resident=63, adapters=63).num_resident == 63


def test_a_gpus_memory_holds_no_adapters_that_are_only_loaded() -> None:
    assert planned().memory.loaded == 16 * ADAPTER.resident
    assert planned(device="cuda").memory.loaded == 0
    assert "--loaded-gib 0.02" in planned(device="cuda").command


def test_the_flags_start_a_server_with_the_planned_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(memory_gib=4, model="my models/base", quantization="int8", rank=16)
    words = shlex.split(plan.command)
    assert words[:3] == ["python", "-m", "server"]
    monkeypatch.setattr("sys.argv", ["server", *words[3:]])
    settings = Settings(_cli_parse_args=True)
    assert (settings.model, settings.quantization, settings.max_rank) == ("my models/base", "int8", 16)
    assert settings.max_resident == plan.num_resident
    assert settings.resident_gib * GIB >= RESERVED_FACTOR * plan.num_resident * ADAPTER.resident
    assert settings.resident_gib * GIB < plan.memory.resident
    assert settings.kv_cache_gib * GIB >= plan.num_kv_tokens * MODEL.kv_token
    assert settings.max_step_tokens > settings.max_batch


def test_a_server_of_a_low_rank_is_started_without_demo_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: the server refused its own demo adapters, which have rank 32."""
    monkeypatch.setattr("sys.argv", ["server", *shlex.split(planned(rank=16).command)[3:]])
    settings = Settings(_cli_parse_args=True)
    assert settings.max_rank == 16
    assert not settings.demo_adapters
    assert "--no-demo-adapters" not in planned(model="other").command


@pytest.mark.parametrize("max_batch", [64, 511])
def test_the_largest_batch_has_flags_that_a_server_takes(max_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["server", *shlex.split(planned(max_batch=max_batch).command)[3:]])
    assert Settings(_cli_parse_args=True).max_batch == max_batch
    with pytest.raises(ValidationError, match="less than 512"):
        configured(max_batch=512)


def test_one_command_starts_all_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, gpus in (("cpu", 0), ("cuda", 1)):
        plan = planned(memory_gib=4, device=device)
        words = shlex.split(plan.cluster_command.replace("CORES", "8"))
        assert words[:3] == ["python", "-m", "server.cluster"]
        monkeypatch.setattr("sys.argv", ["cluster", *words[3:]])
        settings = ClusterSettings(_cli_parse_args=True)
        assert (settings.replicas, settings.replica_cpus, settings.replica_gpus) == (plan.num_replicas, 8, gpus)
        assert settings.replica_settings.max_resident == plan.num_resident


def test_the_assumptions_name_the_ratio_and_its_source() -> None:
    config = configured(ratio=None, terms=2, model="other")
    plan = make_plan(config, MODEL, ADAPTER, Speed(None, 1000, 32))
    text = "\n".join(assumptions(config, plan))
    assert "0.78 times that with them (docs/benchmarks.md: 32 merges of 2, 32 users, SmolLM2-135M" in text
    assert "measured on another model" in text
    assert "10,000 adapters" in text


@pytest.mark.parametrize(
    ("more", "warning"),
    [
        ({"dtype": "float32"}, "The ratio was measured in bfloat16, not in float32"),
        ({"quantization": "int8"}, "The ratio was measured in bfloat16, not in int8"),
        ({"dtype": "float32", "ratio": 0.8}, ""),
        ({}, ""),
    ],
)
def test_a_ratio_of_another_precision_is_named_as_such(more: dict[str, Any], warning: str) -> None:
    config = configured(**({"ratio": None} | more))
    text = "\n".join(assumptions(config, make_plan(config, MODEL, ADAPTER, Speed(None, 1000, 32))))
    assert warning in text
    assert bool(warning) == ("The ratio was measured in" in text)


def test_requests_longer_than_the_context_are_refused() -> None:
    with pytest.raises(PlanError, match="8192 and 100, and SmolLM2-135M-Instruct has a context of 8192"):
        sizes(configured(prompt_tokens=8192))


def test_sizes_are_of_the_dtype_asked_for() -> None:
    (small, adapter), (large, other) = sizes(configured()), sizes(configured(dtype="float32"))
    assert large.kv_token == small.kv_token * torch.float32.itemsize // torch.bfloat16.itemsize
    assert other.resident > adapter.resident
    assert other.on_disk == adapter.on_disk
