"""What the planner refuses, and that it says which flag and what would help."""

from typing import Any

import pytest
from pydantic import ValidationError

from lori.flags import flag_faults
from server.plan.config import PlanConfig

ENOUGH = {"adapters": 100, "rps": 5.0, "tokens_per_s": 500.0}
SIMULATED = ENOUGH | {"simulate": True, "single_tokens_per_s": 100.0, "disk_mb_per_s": 200.0}


def faults(settings: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as found:
        PlanConfig(**settings)
    return flag_faults(found.value)


@pytest.mark.parametrize(
    "more",
    [{"model": "some/model"}, {"dtype": "float32"}, {"quantization": "int8"}, {"users": 8}, {"single_tokens_per_s": 100.0}],
    ids=lambda more: str([*more]),
)
def test_a_speed_that_nobody_measured_is_asked_for(more: dict[str, Any]) -> None:
    said = faults({"adapters": 100, "rps": 5.0} | more)
    assert "--tokens-per-s is missing" in said
    assert "python -m tests.bench.serve --cases off --model" in said
    assert "--server URL" in said


def test_a_batch_of_fewer_than_the_users_wants_the_speed_of_one() -> None:
    assert "--max-batch is 8, and --tokens-per-s is what 32 users get" in faults(ENOUGH | {"max_batch": 8})
    for more in ({"single_tokens_per_s": 100.0}, {"users": 8}):
        assert PlanConfig(**ENOUGH, max_batch=8, **more).max_batch == 8
    assert PlanConfig(adapters=100, rps=5.0, max_batch=8).is_measured


def test_a_server_is_measured_or_told_of() -> None:
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
    said = faults(ENOUGH | more)
    assert said.startswith("--ratio is missing")
    assert "python -m tests.bench.serve --cases off 32" in said
    assert PlanConfig(**ENOUGH, **more, ratio=0.7).ratio == 0.7


def test_more_as_of_a_lower_rank_were_measured() -> None:
    """What a token costs in a step with adapters are the rows of all A's, too, not B's entries alone."""
    known = PlanConfig(**ENOUGH, rank=8, bases=4, sparsity=0.6).known_ratio
    assert known
    assert known.source.startswith("docs/benchmarks.md")


def test_a_gpus_overhead_is_asked_for() -> None:
    assert "--overhead-gib is missing" in faults(ENOUGH | {"device": "cuda", "ratio": 0.9})
    assert "--quantization" in faults(ENOUGH | {"device": "cuda", "ratio": 0.9, "overhead_gib": 2.0, "quantization": "int8"})


def test_products_that_no_cpu_has_are_refused() -> None:
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
def test_what_no_machine_has_is_refused(more: dict[str, Any]) -> None:
    """Some of it ended in `OverflowError`, some in `MemoryError`."""
    assert "Input should be " in faults(ENOUGH | {"ratio": 0.8, "simulate": "requests" in more} | more)


def test_a_flag_that_would_do_nothing_is_refused() -> None:
    said = faults(ENOUGH | {"zipf": 1.0, "disk_mb_per_s": 100.0})
    assert said == "--zipf, --disk-mb-per-s: pass --simulate, too"


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
def test_a_simulation_lacks_nothing(more: dict[str, Any], expected: str) -> None:
    PlanConfig(**SIMULATED)
    assert expected in faults(SIMULATED | more)


def test_the_environment_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LORI_ADAPTERS", "/folder")
    monkeypatch.setenv("SEED", "7")
    assert PlanConfig(**ENOUGH).rank == 32
