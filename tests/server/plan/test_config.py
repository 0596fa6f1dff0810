"""Refusals of the planner's settings: each names the flag and a remedy."""

from typing import Any

import pytest
from pydantic import ValidationError

from lori.flags import flag_faults
from server.plan.config import PlanConfig

ENOUGH = {"adapters": 100, "rps": 5.0, "tokens_per_s": 500.0}
SIMULATED = ENOUGH | {"simulate": True, "single_tokens_per_s": 100.0, "disk_mb_per_s": 200.0}


def faults(settings: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as caught:
        PlanConfig(**settings)
    return flag_faults(caught.value)


@pytest.mark.parametrize(
    "more",
    [{"model": "some/model"}, {"dtype": "float32"}, {"quantization": "int8"}, {"users": 8}, {"single_tokens_per_s": 100.0}],
    ids=lambda more: str([*more]),
)
def test_a_speed_that_nobody_measured_is_asked_for(more: dict[str, Any]) -> None:
    message = faults({"adapters": 100, "rps": 5.0} | more)
    assert "--tokens-per-s is missing" in message
    assert "python -m tests.bench.serve --cases off --model" in message
    assert "--server URL" in message


def test_a_batch_smaller_than_the_users_needs_the_speed_of_one_user() -> None:
    assert "--max-batch is 8, and --tokens-per-s is what 32 users get" in faults(ENOUGH | {"max_batch": 8})
    for more in ({"single_tokens_per_s": 100.0}, {"users": 8}):
        assert PlanConfig(**ENOUGH, max_batch=8, **more).max_batch == 8
    assert PlanConfig(adapters=100, rps=5.0, max_batch=8).is_measured


def test_a_server_to_measure_and_a_given_speed_exclude_each_other() -> None:
    assert "pass either" in faults(ENOUGH | {"server": "http://localhost:8000"})


@pytest.mark.parametrize(
    "more",
    [
        {"terms": 5},
        {"sparsity": 0.5},
        {"rank": 64, "sparsity": 0.95},
        {"bases": 2},
        {"device": "cuda", "overhead_gib": 2.0},
    ],
    ids=lambda more: str([*more]),
)
def test_a_ratio_that_nobody_measured_is_asked_for(more: dict[str, Any]) -> None:
    message = faults(ENOUGH | more)
    assert message.startswith("--ratio is missing")
    assert "python -m tests.bench.serve --cases off 32" in message
    assert PlanConfig(**ENOUGH, **more, ratio=0.7).ratio == 0.7


def test_several_bases_of_a_lower_rank_have_a_measured_ratio() -> None:
    """Compare the rank times the number of bases: a token's cost includes the rows of all A's, not only the entries of B."""
    known = PlanConfig(**ENOUGH, rank=8, bases=4, sparsity=0.6).known_ratio
    assert known
    assert known.source.startswith("docs/benchmarks.md")


def test_a_gpus_overhead_is_asked_for() -> None:
    assert "--overhead-gib is missing" in faults(ENOUGH | {"device": "cuda", "ratio": 0.9})
    assert "--quantization" in faults(ENOUGH | {"device": "cuda", "ratio": 0.9, "overhead_gib": 2.0, "quantization": "int8"})


def test_int8_weights_of_a_float32_model_are_refused() -> None:
    assert "--quantization int8 is of a model in bfloat16, not in float32" in faults(
        ENOUGH | {"dtype": "float32", "quantization": "int8"}
    )


@pytest.mark.parametrize(
    "more",
    [
        {"tokens_per_s": 1e-308},
        {"memory_gib": 1e308},
        {"rps": 1e300},
        {"requests": 10**12},
        *({name: 10**12} for name in ("bases", "terms", "users", "spare", "max_batch")),
    ],
    ids=lambda more: str([*more]),
)
def test_values_that_no_machine_has_are_refused(more: dict[str, Any]) -> None:
    """Regression: some of these values ended in `OverflowError`, others in `MemoryError`."""
    assert "Input should be " in faults(ENOUGH | {"ratio": 0.8, "simulate": "requests" in more} | more)


def test_a_flag_that_would_do_nothing_is_refused() -> None:
    message = faults(ENOUGH | {"zipf": 1.0, "disk_mb_per_s": 100.0})
    assert message == "--zipf, --disk-mb-per-s: pass --simulate, too"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"disk_mb_per_s": None}, "--disk-mb-per-s is missing"),
        ({"single_tokens_per_s": None}, "--single-tokens-per-s is missing"),
        ({"replicas": [0]}, "--replicas: expected 1 or more"),
        ({"plot": "page.html"}, "--plot ends in '.html'"),
        ({"plot": "no/such/folder/page.png"}, "--plot: there is no folder no/such/folder"),
        ({"terms": 2}, "--terms says more"),
    ],
)
def test_a_simulation_needs_all_its_settings(more: dict[str, Any], expected: str) -> None:
    PlanConfig(**SIMULATED)
    assert expected in faults(SIMULATED | more)


def test_the_environment_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LORI_ADAPTERS", "/folder")
    monkeypatch.setenv("SEED", "7")
    assert PlanConfig(**ENOUGH).rank == 32
