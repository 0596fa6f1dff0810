"""What steps are found to cost: with a fake of the engine's turn, whose steps take as long as a test says."""

from collections.abc import Sequence
from typing import cast

import pytest

from server.engine import startup
from server.engine.request import Chunk
from server.engine.scheduling.step_budget import StepCost
from server.engine.startup import FAR, NUM_ROUNDS, measure_step_cost
from server.engine.step import StepExecutor


class FakeTurn:
    """Is the clock, too: a step takes `fixed` seconds, and what is in it takes; each `slow_every`-th thrice that."""

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


def measure(turn: FakeTurn, monkeypatch: pytest.MonkeyPatch, **limits: int) -> StepCost:
    monkeypatch.setattr(startup, "time", turn)
    sizes = {"max_tokens": 512, "max_sequences": 64, "max_context": 8192, "num_blocks": 4096, "block_size": 16}
    return measure_step_cost(cast(StepExecutor, turn), num_ids=100, **(sizes | limits))


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "MAX_SECONDS", 1e9)


@pytest.mark.parametrize("slow_every", [0, 5])
def test_what_a_step_takes_is_found_whatever_else_the_machine_does_at_times(
    monkeypatch: pytest.MonkeyPatch, slow_every: int
) -> None:
    cost = measure(FakeTurn(slow_every=slow_every), monkeypatch)
    assert [cost.prompt(count) for count in (1, 16, 64, 200)] == pytest.approx([8.5, 16, 40, 108])
    assert [cost.decoding(count) for count in (1, 16, 64)] == pytest.approx([8.5, 16, 40])
    assert cost.per_key == pytest.approx(0.001)
    assert cost.per_pair == pytest.approx(0.0002)


def test_steps_much_longer_than_the_shortest_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure(FakeTurn(), monkeypatch).prompt.counts == (1, 8, 16, 32, 64)
    assert measure(FakeTurn(per_token=0.001), monkeypatch).prompt.counts == (1, 8, 16, 32, 64, 128, 256, 512)


def test_slow_steps_are_timed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    quick, slow = FakeTurn(), FakeTurn()
    sizes = measure(quick, monkeypatch)
    monkeypatch.setattr(startup, "MAX_SECONDS", 1e-9)
    measure(slow, monkeypatch)
    # Two of each size of prompt, to see which are worth it; then turns, of which the first may have to compile.
    num_before = 2 * len(sizes.prompt.counts)
    a_turn = len(sizes.prompt.counts) + len(sizes.decoding.counts) + 2
    assert len(quick.steps) == num_before + NUM_ROUNDS * a_turn
    assert len(slow.steps) == num_before + 2 * a_turn


def test_a_step_that_seems_to_cost_less_than_a_smaller_one_is_taken_to_cost_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = measure(FakeTurn(per_token=-0.01), monkeypatch)
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
def test_no_step_is_larger_than_the_server_s_own(monkeypatch: pytest.MonkeyPatch, limits: dict[str, int]) -> None:
    turn = FakeTurn()
    measure(turn, monkeypatch, **limits)
    for chunks in turn.steps:
        assert max(c.stop for c in chunks) <= limits.get("max_context", FAR + 512)
        assert sum(c.stop - c.start for c in chunks) <= limits.get("max_tokens", 512)
        assert len(chunks) <= limits.get("max_sequences", 64)
        assert max(block for c in chunks for block in c.sequence.blocks) < limits.get("num_blocks", 4096)
        assert all(len(c.sequence.blocks) * 16 >= c.stop for c in chunks)


def test_the_sequences_far_into_a_context_have_keys_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = FakeTurn()
    measure(turn, monkeypatch)
    (few, *_) = [chunks for chunks in turn.steps if len(chunks) > 1 and chunks[0].start]
    blocks = [block for c in few for block in c.sequence.blocks]
    assert len(few) > 1
    assert len(blocks) == len(set(blocks))
