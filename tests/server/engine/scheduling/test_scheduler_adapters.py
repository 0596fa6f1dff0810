"""Sequences whose adapters are not resident: they wait for a load or for room, and others may overtake them."""

from server.engine.request import Sequence
from server.engine.scheduling.scheduler import Residency
from tests.server.plans import FakeGate, added, request, run, run_step, scheduler


def test_a_sequence_that_waits_for_an_adapter_is_overtaken_and_joins_once_it_is_loaded() -> None:
    gate = FakeGate(delays={"cold": 2})
    it = scheduler(gate=gate)
    cold = added(it, request(adapters=["cold"]))
    warm = added(it, request(adapters=["warm"]))
    base = added(it, request())
    assert {c.sequence for c in run_step(it)} == {warm, base}
    gate.tick()
    assert cold not in {c.sequence for c in run_step(it)}
    assert gate.tick() == ["cold"]
    assert cold in {c.sequence for c in run_step(it)}


def test_others_of_the_flow_of_a_loading_sequence_do_not_overtake_it_and_are_not_asked_about() -> None:
    gate = FakeGate(delays={"cold": 1})
    it = scheduler(gate=gate)
    sequences = [added(it, request(adapters=["cold"])) for _ in range(3)]
    assert run_step(it) == []
    assert gate.asked == sequences[:1]
    gate.tick()
    assert list(it.running) == []
    run_step(it)
    assert list(it.running) == sequences


def test_an_engine_whose_sequences_all_wait_for_adapters_may_sleep_until_one_is_loaded() -> None:
    gate = FakeGate(delays={"cold": 1})
    it = scheduler(gate=gate)
    assert not it.can_step
    cold = added(it, request(adapters=["cold"]))
    assert it.can_step
    assert run_step(it) == []
    assert it.has_work
    assert not it.can_step
    warm = added(it, request(1, 1))
    assert it.can_step, "another sequence arrived"
    assert [c.sequence for c in run_step(it)] == [warm]
    assert run_step(it) == []
    assert not it.can_step
    gate.tick()
    it.wake()
    assert it.can_step
    assert [c.sequence for c in run_step(it)] == [cold]


def test_no_sequence_overtakes_one_that_finds_the_adapter_memory_full() -> None:
    gate = FakeGate(num_slots=1)
    it = scheduler(gate=gate)
    holder = added(it, request(2, 3, adapters=["a"]))
    run_step(it)
    waiting = added(it, request(adapters=["b"]))
    behind = added(it, request())
    assert [c.sequence for c in run_step(it)] == [holder]
    assert list(it.waiting) == [waiting, behind]
    assert waiting not in gate.held
    run_step(it)
    assert {c.sequence for c in run_step(it)} == {waiting, behind}


def test_a_loading_sequence_may_overtake_one_that_finds_the_adapter_memory_full() -> None:
    # The loading sequence holds the only slot. Its tenant has been served more, so it is not the first any more.
    gate = FakeGate(num_slots=1, delays={"a": 1})
    it = scheduler(gate=gate)
    loading = added(it, request(adapters=["a"], tenant="t"))
    assert run_step(it) == []
    added(it, request(3, 1, text=1, tenant="t"))
    first = added(it, request(adapters=["b"], tenant="u"))
    run_step(it)
    gate.tick()
    it.wake()
    assert loading in {c.sequence for c in run_step(it)}
    assert first in it.waiting
    run(it)


class ForgetfulGate(FakeGate):
    """A gate that gives the room of the sequences in `evicted` to others while they load."""

    evicted: tuple[Sequence, ...] = ()

    def acquire(self, sequence: Sequence) -> Residency:
        if sequence in self.evicted:
            self.held.pop(sequence, None)
            return "full"
        return super().acquire(sequence)


def test_a_loading_sequence_overtakes_one_that_lost_its_room_while_it_was_loading() -> None:
    gate = ForgetfulGate(delays={"a": 1, "b": 1})
    it = scheduler(gate=gate)
    first, second = added(it, request(adapters=["a"])), added(it, request(adapters=["b"]))
    assert run_step(it) == []
    gate.tick()
    gate.evicted = (first,)
    assert [c.sequence for c in run_step(it)] == [second]
    gate.evicted = ()
    assert first in {c.sequence for c in run_step(it)}


class BusyGate(FakeGate):
    """A gate that defers the loads of the sequences in `behind`."""

    behind: tuple[Sequence, ...] = ()

    def is_load_deferred(self, sequence: Sequence) -> bool:
        return sequence in self.behind


def test_a_sequence_whose_load_is_deferred_is_not_asked_about_and_others_overtake_it() -> None:
    """Regression: of a thousand adapters that were requested at once, all were asked about in every step."""
    gate = BusyGate(delays={"a": 5, "b": 5})
    it = scheduler(gate=gate)
    read, behind = added(it, request(adapters=["a"])), added(it, request(adapters=["b"]))
    assert run_step(it) == []
    gate.behind, gate.asked = (behind,), []
    base = added(it, request(8, 1))
    assert [c.sequence for c in run_step(it)] == [base]
    assert gate.asked == [read, base]
    gate.behind = ()
    while it.has_work:
        gate.tick()
        it.wake()
        run_step(it)


def test_a_sleeping_engine_steps_when_a_sequence_that_blocked_others_is_dropped() -> None:
    gate = FakeGate(num_slots=1, delays={"cold": 9})
    it = scheduler(gate=gate)
    loading = added(it, request(adapters=["cold"]))
    behind = added(it, request(adapters=["a"]))
    assert run_step(it) == []
    assert not it.can_step
    it.abort(loading)
    it.drop_aborted()
    assert it.can_step
    assert [c.sequence for c in run_step(it)] == [behind]


def test_the_adapters_of_a_sequence_are_released_when_it_is_dropped() -> None:
    gate = FakeGate(num_slots=2, delays={"cold": 5})
    it = scheduler(gate=gate)
    loading = added(it, request(adapters=["cold"]))
    running = added(it, request(2, 9, adapters=["a"]))
    full = added(it, request(adapters=["b"]))
    run_step(it)
    assert gate.held == {loading: "loading", running: "ready"}
    for sequence in (loading, running, full):
        it.abort(sequence)
        it.drop_aborted()
        assert sequence not in gate.held
    assert not gate.held
    assert not it.has_work
