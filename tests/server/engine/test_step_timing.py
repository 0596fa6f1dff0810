"""Measured costs of steps, with a fake executor whose steps take as long as a test sets."""

from collections.abc import Sequence
from typing import cast

import pytest

from server.engine import startup
from server.engine.request import Chunk
from server.engine.scheduling.step_budget import StepCost
from server.engine.startup import FAR, NUM_ROUNDS, measure_step_cost
from server.engine.step import StepExecutor


class FakeExecutor:
    """An executor that is the clock, too.

    A step takes `fixed` seconds plus those of its chunks. Each `slow_every`-th step takes three times as long.
    """

    def __init__(self, fixed: float = 8.0, per_token: float = 0.5, slow_every: int = 0) -> None:
        self.now, self.steps = 0.0, list[Sequence[Chunk]]()
        self._fixed, self._per_token, self._slow_every = fixed, per_token, slow_every

    def perf_counter(self) -> float:
        return self.now

    def compute(self, chunks: Sequence[Chunk]) -> None:
        self.steps.append(chunks)
        assert all(c.is_last and c.sequence.terms == [] for c in chunks)
        seconds = self._fixed + self._per_token * sum(c.stop - c.start for c in chunks)
        seconds += sum((0.001 + 0.0002 * (c.stop - c.start)) * c.start for c in chunks)
        self.now += seconds * (3 if self._slow_every and len(self.steps) % self._slow_every == 0 else 1)


def measure(executor: FakeExecutor, monkeypatch: pytest.MonkeyPatch, **limits: int) -> StepCost:
    monkeypatch.setattr(startup, "time", executor)
    sizes = {"max_tokens": 512, "max_sequences": 64, "max_context": 8192, "num_blocks": 4096, "block_size": 16}
    return measure_step_cost(cast(StepExecutor, executor), num_ids=100, **(sizes | limits))


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "MAX_SECONDS", 1e9)


@pytest.mark.parametrize("slow_every", [0, 5])
def test_step_costs_are_measured_right_even_if_the_machine_is_slow_at_times(
    monkeypatch: pytest.MonkeyPatch, slow_every: int
) -> None:
    cost = measure(FakeExecutor(slow_every=slow_every), monkeypatch)
    assert [cost.prompt(count) for count in (1, 16, 64, 200)] == pytest.approx([8.5, 16, 40, 108])
    assert [cost.decoding(count) for count in (1, 16, 64)] == pytest.approx([8.5, 16, 40])
    assert cost.per_key == pytest.approx(0.001)
    assert cost.per_pair == pytest.approx(0.0002)


def test_steps_much_longer_than_the_shortest_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure(FakeExecutor(), monkeypatch).prompt.counts == (1, 8, 16, 32, 64)
    assert measure(FakeExecutor(per_token=0.001), monkeypatch).prompt.counts == (1, 8, 16, 32, 64, 128, 256, 512)


def test_slow_steps_are_timed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    quick, slow = FakeExecutor(), FakeExecutor()
    sizes = measure(quick, monkeypatch)
    monkeypatch.setattr(startup, "MAX_SECONDS", 1e-9)
    measure(slow, monkeypatch)
    # Two steps of each prompt size, to choose the sizes to time. Then rounds, of which the first may have to compile.
    num_before = 2 * len(sizes.prompt.counts)
    steps_per_round = len(sizes.prompt.counts) + len(sizes.decoding.counts) + 2
    assert len(quick.steps) == num_before + NUM_ROUNDS * steps_per_round
    assert len(slow.steps) == num_before + 2 * steps_per_round


def test_a_larger_step_never_costs_less_than_a_smaller_one(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = measure(FakeExecutor(per_token=-0.01), monkeypatch)
    assert cost.prompt(1) == cost.prompt(512) > 0
    assert cost.per_pair >= 0
    assert cost.per_key >= 0


@pytest.mark.parametrize(
    "limits",
    [
        {"max_sequences": 1, "max_tokens": 2},
        {"max_context": 16, "num_blocks": 1},
        {"max_context": 48, "num_blocks": 3},
        {"max_context": 1100, "num_blocks": 140},
    ],
)
def test_no_measured_step_is_larger_than_the_server_s_limits(monkeypatch: pytest.MonkeyPatch, limits: dict[str, int]) -> None:
    executor = FakeExecutor()
    measure(executor, monkeypatch, **limits)
    for chunks in executor.steps:
        assert max(c.stop for c in chunks) <= limits.get("max_context", FAR + 512)
        assert sum(c.stop - c.start for c in chunks) <= limits.get("max_tokens", 512)
        assert len(chunks) <= limits.get("max_sequences", 64)
        assert max(block for c in chunks for block in c.sequence.blocks) < limits.get("num_blocks", 4096)
        assert all(len(c.sequence.blocks) * 16 >= c.stop for c in chunks)


def test_measured_sequences_with_long_contexts_have_their_own_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = FakeExecutor()
    measure(executor, monkeypatch)
    (few, *_) = [chunks for chunks in executor.steps if len(chunks) > 1 and chunks[0].start]
    blocks = [block for c in few for block in c.sequence.blocks]
    assert len(few) > 1
    assert len(blocks) == len(set(blocks))
