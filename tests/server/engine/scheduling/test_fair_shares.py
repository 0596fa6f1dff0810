"""Fair shares of tenants and adapters in the scheduler: none is starved, and none is preempted in vain."""

import pytest

from server.engine.request import Chunk, Sequence
from server.engine.scheduling.scheduler import Scheduler
from tests.server.plans import FakeGate, added, num_tokens, request, run, run_step, scheduler


def served_until(it: Scheduler, stop: Sequence, max_steps: int = 100) -> int:
    """Run steps until the sequence `stop` runs. Return the number of tokens computed until then."""
    total = 0
    for _ in range(max_steps):
        if stop in it.running:
            return total
        total += num_tokens(run_step(it))
    raise AssertionError("the sequence never ran")


@pytest.mark.parametrize("difference", ["tenant", "adapter"])
def test_a_flood_starves_no_other_tenant_or_adapter(difference: str) -> None:
    it = scheduler(1000, max_sequences=4, max_tokens=64)
    for text in range(200):
        added(it, request(40, 4, text=text, adapters=["flood"], tenant="flood"))
    for _ in range(20):
        run_step(it)
    other = added(it, request(4, 4, adapters=["other"], tenant="other" if difference == "tenant" else "flood"))
    assert served_until(it, other) <= 4 * 44, "it waits at most for the sequences that already run"


@pytest.mark.parametrize("lacks", ["places", "memory"])
def test_a_tenant_with_nothing_running_is_given_a_place_of_the_tenant_with_the_most(lacks: str) -> None:
    """Regression: where one tenant had taken all places, another tenant waited for the end of the longest answers."""
    max_sequences, num_blocks = (4, 1000) if lacks == "places" else (16, 12)
    it = scheduler(num_blocks, block_size=16, max_sequences=max_sequences, max_tokens=64)
    flood = [added(it, request(20, 100, text=text, tenant="flood")) for text in range(8)]
    modest = added(it, request(20, 100, text=10, tenant="modest"))
    for _ in range(3):
        run_step(it)
    late = added(it, request(20, 4, text=20, tenant="late"))
    for _ in range(3):
        run_step(it)
    assert late in it.running
    assert modest in it.running, "a tenant keeps its only place"
    assert it.num_preemptions >= 1
    for _ in range(2000):
        if not it.has_work:
            break
        run_step(it)
    assert [len(sequence.output_ids) for sequence in (*flood, modest, late)] == [100] * 9 + [4], "no output is lost"


def test_no_sequence_is_preempted_for_one_that_waits_for_an_adapter() -> None:
    gate = FakeGate(num_slots=4, delays={"slow": 5})
    it = scheduler(1000, gate=gate, max_sequences=4, max_tokens=64)
    for text in range(4):
        added(it, request(20, 50, text=text, tenant="flood"))
    run_step(it)
    late = added(it, request(20, 4, text=10, tenant="late", adapters=["slow"]))
    for _ in range(4):
        run_step(it)
        gate.tick()
    assert it.num_preemptions == 0
    gate.tick()
    run_step(it)
    assert late in it.running
    assert it.num_preemptions == 1


@pytest.mark.parametrize("lacks", ["memory", "slots"])
def test_no_sequence_is_preempted_in_vain(lacks: str) -> None:
    gate = FakeGate(num_slots=1 if lacks == "slots" else 1000)
    it = scheduler(40, block_size=4, max_sequences=8, max_tokens=64, gate=gate)
    for text in range(4):
        added(it, request(20, 20, text=text, tenant="flood", adapters=["x"]))
    run_step(it)
    late = added(it, request(150 if lacks == "memory" else 4, 4, text=10, tenant="late", adapters=["y"]))
    for _ in range(5):
        run_step(it)
    assert it.num_preemptions == 0
    assert len(it.running) == 4
    while late in it.waiting:
        run_step(it)


def test_a_tenant_with_nothing_running_gets_a_place_while_others_wait_for_adapters() -> None:
    gate = FakeGate(delays={"slow": 5})
    it = scheduler(1000, max_sequences=4, max_tokens=64, gate=gate)
    for text in range(3):
        added(it, request(20, 90, text=text, tenant="flood"))
    added(it, request(20, 90, text=3, tenant="flood", adapters=["slow"]))
    run_step(it)
    added(it, request(20, 90, text=4, tenant="flood"))
    run_step(it)
    late = added(it, request(4, 4, text=10, tenant="late", adapters=["other"]))
    for _ in range(3):
        run_step(it)
    assert late in it.running


def test_a_tenant_with_a_place_preempts_no_other_tenant() -> None:
    it = scheduler(1000, max_sequences=4, max_tokens=64)
    for text in range(8):
        added(it, request(20, 50, text=text, tenant="flood"))
    added(it, request(20, 50, text=10, tenant="other"))
    added(it, request(20, 50, text=11, tenant="other"))
    for _ in range(20):
        run_step(it)
    assert it.num_preemptions == 0


def test_no_sequence_is_preempted_for_a_less_urgent_one() -> None:
    it = scheduler(1000, max_sequences=4, max_tokens=64)
    for text in range(4):
        added(it, request(20, 50, text=text, tenant="urgent"))
    run_step(it)
    late = added(it, request(20, 4, text=10, tenant="late", priority=1))
    for _ in range(10):
        run_step(it)
    assert late not in it.running
    assert it.num_preemptions == 0


def test_two_tenants_that_always_wait_are_served_about_the_same() -> None:
    """The difference stays within the paper's bound, twice what can run at once, though one floods with long prompts."""
    max_sequences, long, short = 8, request(200, 4, tenant="flood"), request(10, 30, tenant="other")
    it = scheduler(2000, block_size=16, max_sequences=max_sequences, max_tokens=128)
    for text in range(1000):
        added(it, request(200, 4, text=text, tenant="flood"))
    for text in range(600):
        added(it, request(10, 30, text=2000 + text, tenant="other"))
    served = {"flood": 0, "other": 0}
    bound = 2 * max_sequences * max(long.max_tokens + 200, short.max_tokens + 10)
    while any(s.request.tenant == "other" for s in it.waiting):
        for chunk in run_step_unchecked(it):
            served[chunk.sequence.request.tenant] += chunk.stop - chunk.start
        assert abs(served["flood"] - served["other"]) <= bound
    assert served["other"] > 5 * bound, "the run has to be long enough to show a difference"
    assert sum(s.request.tenant == "flood" for s in it.waiting) > 0


def run_step_unchecked(scheduler: Scheduler) -> list[Chunk]:
    chunks = scheduler.plan()
    for chunk in chunks:
        scheduler.commit(chunk, 7 if chunk.is_last else None)
        if len(chunk.sequence.output_ids) == chunk.sequence.request.max_tokens:
            scheduler.finish(chunk.sequence)
    return chunks


def test_free_places_are_shared_before_anything_is_computed() -> None:
    it = scheduler(1000, max_sequences=8, max_tokens=64)
    for tenant in ("a", "b"):
        for text in range(20):
            added(it, request(20, text=text, tenant=tenant))
    it.plan()
    assert sorted(s.request.tenant for s in it.running) == ["a"] * 4 + ["b"] * 4


def test_tokens_served_are_reported_by_tenant_and_adapters() -> None:
    it = scheduler(max_tokens=64)
    added(it, request(10, 5, tenant="t", adapters=["a"]))
    run_step(it)
    run_step(it)
    assert it.tokens_charged == {("t", ("a",)): 12}
    run(it)
    assert it.tokens_charged == {}
