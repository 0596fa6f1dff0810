"""Fair queue: order by priority, then by the tokens served to tenants and to their flows, then by arrival."""

import random

import pytest

from server.engine.request import Sequence
from server.engine.scheduling.fair_queue import MAX_REMEMBERED, FairQueue, Flow, VirtualTokenQueue
from tests.server.plans import request


def added(to: FairQueue, adapter: str = "", tenant: str = "", priority: int = 0) -> Sequence:
    sequence = Sequence(request(adapters=[adapter] if adapter else [], tenant=tenant, priority=priority))
    to.add(sequence)
    return sequence


def taken(queue: FairQueue, num_tokens: int = 0) -> Sequence:
    """Start the first sequence, and charge it."""
    sequence = queue.first()
    assert sequence is not None
    queue.start(sequence)
    queue.charge(sequence, num_tokens)
    return sequence


def tenants(queue: FairQueue, count: int, num_tokens: int) -> list[str]:
    return [taken(queue, num_tokens).request.tenant for _ in range(count)]


def adapter(sequence: Sequence) -> str:
    return "+".join(digest for digest, _ in sequence.request.residents)


def test_within_a_flow_the_first_to_come_is_first() -> None:
    queue = FairQueue()
    sequences = [added(queue) for _ in range(5)]
    assert [taken(queue, 10) for _ in range(5)] == sequences
    assert queue.first() is None


def test_a_lower_priority_number_goes_first_however_many_tokens_it_was_served() -> None:
    queue = FairQueue()
    late, early, middle = added(queue, priority=5), added(queue, priority=-1), added(queue, priority=0)
    assert [taken(queue, 100) for _ in range(3)] == [early, middle, late]


def test_tenants_share_tokens_and_not_requests() -> None:
    queue = FairQueue()
    for _ in range(30):
        added(queue, tenant="large")
        added(queue, tenant="small")
    served = {"large": 0, "small": 0}
    for _ in range(40):
        sequence = queue.first()
        assert sequence is not None
        tenant = sequence.request.tenant
        served[tenant] += 30 if tenant == "large" else 10
        taken(queue, 30 if tenant == "large" else 10)
        assert abs(served["large"] - served["small"]) <= 30
    assert served["large"] == served["small"]


def test_a_tenant_gets_no_more_by_naming_many_adapters() -> None:
    queue = FairQueue()
    for number in range(20):
        added(queue, tenant="many", adapter=f"a{number}")
        added(queue, tenant="one")
    assert tenants(queue, 20, 10).count("one") == 10


def test_a_flood_on_one_adapter_starves_no_other_of_the_tenant() -> None:
    queue = FairQueue()
    for _ in range(100):
        added(queue, adapter="flood")
    for _ in range(10):
        taken(queue, 50)
    other = added(queue, adapter="other")
    base = added(queue)
    assert {taken(queue, 50) for _ in range(3)} >= {other, base}


def test_the_weights_of_a_merge_make_no_flow_of_its_own() -> None:
    queue = FairQueue()
    for weight in (0.1, 0.2, 0.3, 0.4):
        queue.add(Sequence(request(adapters=["a", "b"], weight=weight)))
    other = added(queue, adapter="c")
    taken(queue, 10)
    assert taken(queue, 10) is other
    assert queue.tokens_charged() == {("", ("a", "b")): 10, ("", ("c",)): 10}


def test_idleness_earns_no_credit() -> None:
    queue = FairQueue()
    for _ in range(100):
        added(queue, tenant="busy")
    tenants(queue, 50, 100)
    for _ in range(20):
        added(queue, tenant="new")
    assert tenants(queue, 20, 100).count("busy") == 10


def test_a_tenant_that_only_runs_earns_no_credit_against_waiting_tenants() -> None:
    queue = FairQueue()
    added(queue, tenant="slow")
    for _ in range(100):
        added(queue, tenant="busy")
    tenants(queue, 51, 100)
    for _ in range(20):
        added(queue, tenant="slow")
    assert tenants(queue, 20, 100).count("busy") >= 9


def test_a_tenant_that_arrives_while_none_waits_has_no_credit_over_running_tenants() -> None:
    queue = FairQueue()
    for _ in range(10):
        added(queue, tenant="busy")
    tenants(queue, 10, 100)
    for _ in range(20):
        added(queue, tenant="new")
        added(queue, tenant="busy")
    assert tenants(queue, 20, 100).count("busy") == 10


def test_the_counter_of_a_tenant_is_remembered_while_it_is_idle() -> None:
    queue = FairQueue()
    for _ in range(30):
        added(queue, tenant="steady")
    burst = added(queue, tenant="burst")
    tenants(queue, 2, 10)
    queue.charge(burst, 190)
    queue.remove(burst)
    for _ in range(30):
        added(queue, tenant="burst")
    assert tenants(queue, 19, 10) == ["steady"] * 19


def test_idle_tenants_and_flows_are_forgotten() -> None:
    queue = FairQueue()
    for number in range(1000):
        added(queue, tenant=f"t{number}", adapter=f"a{number}", priority=number % 3)
        queue.remove(taken(queue, 10))
    assert not queue._levels
    assert not queue._placements


def test_remembered_counters_and_stale_heap_entries_take_bounded_memory() -> None:
    flows: VirtualTokenQueue[Flow] = VirtualTokenQueue()
    steady = flows.get_or_add("steady", Flow)
    flows.add_waiting(steady)
    for number in range(3000):
        flow = flows.get_or_add(number % 1500, Flow)
        flow.charge(1000)
        flows.add_waiting(flow)
        flows.remove_waiting(flow)
        flows.drop_idle(number % 1500)
    assert len(flows._remembered_counters) <= MAX_REMEMBERED
    assert len(flows._heap) <= 32
    assert list(flows.active) == ["steady"]
    assert flows.first() is steady


def test_a_requeued_sequence_goes_before_all_others_of_its_flow() -> None:
    queue = FairQueue()
    sequences = [added(queue) for _ in range(4)]
    first, second = taken(queue), taken(queue)
    queue.requeue(second)
    queue.requeue(first)
    assert [taken(queue) for _ in range(4)] == sequences


def test_a_skipped_flow_delays_no_other() -> None:
    queue = FairQueue()
    cold = [added(queue, adapter="cold") for _ in range(2)]
    warm = added(queue, adapter="warm")
    other = added(queue, tenant="other")
    low = added(queue, priority=1)
    assert queue.first() is cold[0]
    queue.skip(cold[0])
    assert {taken(queue, 5), taken(queue, 5)} == {warm, other}
    assert taken(queue) is low
    assert queue.first() is None
    queue.unskip_all()
    assert [taken(queue), taken(queue)] == cold
    queue.check_integrity(set(), {*cold, warm, other, low})


def test_charged_tokens_are_reported_for_active_flows() -> None:
    queue = FairQueue()
    one, two = added(queue, tenant="t", adapter="a"), added(queue, tenant="t", adapter="b")
    taken(queue, 5)
    taken(queue, 7)
    assert queue.tokens_charged() == {("t", ("a",)): 5, ("t", ("b",)): 7}
    queue.remove(one)
    queue.charge(two, 1)
    assert queue.tokens_charged() == {("t", ("b",)): 8}


@pytest.mark.parametrize("seed", range(20))
def test_the_order_is_that_of_the_counters(seed: int) -> None:
    """Compare with a search over all counters, through arrivals, ends, requeued sequences and skipped flows."""
    rng = random.Random(seed)
    queue = FairQueue()
    waiting: set[Sequence] = set()
    running: set[Sequence] = set()
    for _ in range(400):
        kind = rng.random()
        if kind < 0.4:
            waiting.add(added(queue, rng.choice("abc"), rng.choice("tu"), rng.randint(0, 1)))
        elif kind < 0.7 and waiting:
            skipped = []
            for _ in range(rng.randint(0, 2)):
                if (sequence := queue.first()) is not None:
                    queue.skip(sequence)
                    skipped.append(queue._placements[sequence].flow)
            if (sequence := queue.first()) is not None:
                open_places = [p for s in waiting if (p := queue._placements[s]).flow not in skipped]
                least = min(s.request.priority for s in waiting if queue._placements[s].flow not in skipped)
                level = queue._levels[least]
                open_places = [p for p in open_places if p.level is level]
                tenant = queue._placements[sequence].tenant
                assert sequence.request.priority == least
                assert tenant.counter == min(p.tenant.counter for p in open_places)
                flows = [p.flow for p in open_places if p.tenant is tenant]
                assert queue._placements[sequence].flow.counter == min(flow.counter for flow in flows)
                queue.start(sequence)
                queue.charge(sequence, rng.randint(1, 50))
                waiting.remove(sequence)
                running.add(sequence)
            queue.unskip_all()
        elif kind < 0.8 and running:
            sequence = rng.choice(sorted(running, key=id))
            running.remove(sequence)
            waiting.add(sequence)
            queue.requeue(sequence)
        elif both := sorted(waiting | running, key=id):
            sequence = rng.choice(both)
            queue.remove(sequence)
            waiting.discard(sequence)
            running.discard(sequence)
        for sequence in running:
            queue.charge(sequence, 1)
        queue.check_integrity(waiting, running)
