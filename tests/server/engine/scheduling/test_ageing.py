"""Ageing: a lower priority waits for a bounded time, and an overdue sequence is not preempted again and again."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server.engine.request import Sequence
from server.engine.scheduling.fair_queue import Ageing
from server.engine.scheduling.scheduler import Scheduler
from tests.server.forked import start_forked
from tests.server.live import LIMIT_S
from tests.server.plans import added, added_choices, request, run, run_step, scheduler

WAIT_S = 60.0


def ageing_scheduler(num_blocks: int = 64, *, max_sequences: int = 4, max_tokens: int = 64, wait_s: float = WAIT_S) -> Scheduler:
    return scheduler(num_blocks, max_sequences=max_sequences, max_tokens=max_tokens, max_priority_wait_s=wait_s)


def step_at(it: Scheduler, now: float) -> None:
    it.raise_overdue(now)
    run_step(it)


class Stream:
    """An endless stream of urgent requests, of which `num_waiting` wait at any time."""

    def __init__(self, it: Scheduler, num_waiting: int = 3, tenant: str = "", max_tokens: int = 4, priority: int = 0) -> None:
        self._it, self._num_waiting, self._tenant, self._max_tokens = it, num_waiting, tenant, max_tokens
        self._priority = priority
        self.sent: list[Sequence] = []

    def fill(self) -> None:
        while sum(sequence in self._it.waiting for sequence in self.sent) < self._num_waiting:
            urgent_request = request(4, self._max_tokens, text=1, priority=self._priority, tenant=self._tenant)
            self.sent.append(added(self._it, urgent_request))


def steps_until(it: Scheduler, is_so: Callable[[], bool], stream: Stream, start_s: float, max_steps: int = 200) -> int:
    """Run steps, a second each, beside the stream until `is_so`. Return the number of steps."""
    for step in range(max_steps):
        if is_so():
            return step
        stream.fill()
        step_at(it, start_s + step)
    return max_steps


def is_served(sequence: Sequence) -> bool:
    return len(sequence.output_ids) == sequence.request.max_tokens


@pytest.mark.parametrize("tenant", ["", "batch"])
@pytest.mark.parametrize("adapter", ["", "a"])
def test_a_lower_priority_is_served_after_a_bounded_wait(tenant: str, adapter: str) -> None:
    it = ageing_scheduler(max_sequences=2)
    stream = Stream(it)
    stream.fill()
    step_at(it, 0.0)
    low = added(it, request(4, 2, priority=9, tenant=tenant, adapters=[adapter] if adapter else []))
    assert steps_until(it, lambda: is_served(low), stream, 0.0) in range(60, 90)
    assert it.num_preemptions <= 1


def test_without_a_limit_a_lower_priority_waits_as_long_as_there_is_a_higher_one() -> None:
    it = ageing_scheduler(max_sequences=2, wait_s=float("inf"))
    stream = Stream(it)
    stream.fill()
    step_at(it, 0.0)
    low = added(it, request(4, 2, priority=9))
    assert steps_until(it, lambda: is_served(low), stream, 0.0) == 200


def test_each_sequence_of_a_flow_has_a_wait_of_its_own() -> None:
    it = ageing_scheduler(max_sequences=1)
    stream = Stream(it)
    stream.fill()
    step_at(it, 0.0)
    first, second = added(it, request(4, 1, priority=9)), added(it, request(4, 1, priority=9))
    step_at(it, 1.0)
    third = added(it, request(4, 1, priority=9))
    step_at(it, 2.0)
    it.raise_overdue(WAIT_S + 1.0)
    assert [s.is_raised for s in (first, second, third)] == [True, True, False]
    it.check_integrity()


def test_a_backlog_that_was_raised_delays_a_higher_priority_by_no_more_than_its_share() -> None:
    """In a queue shared with the urgent requests, the whole raised backlog would go before every later urgent request."""
    it = ageing_scheduler(max_sequences=1)
    blocker = added(it, request(4, 3))
    step_at(it, 0.0)
    for _ in range(50):
        added(it, request(4, 4, priority=9))
    step_at(it, 0.0)
    it.raise_overdue(WAIT_S)
    urgent = [added(it, request(4, 4, text=1)) for _ in range(3)]
    order = []
    while not all(map(is_served, urgent)):
        order += [s for s in it.running if s not in order]
        step_at(it, WAIT_S)
    assert order[0] is blocker
    assert len(order) <= 1 + 2 * len(urgent) + 1


def test_an_overdue_sequence_is_not_preempted_again_and_again_by_the_requests_it_waited_for() -> None:
    """Growing sequences take the blocks of the lowest priority, so the overdue one would join and be preempted repeatedly."""
    it = ageing_scheduler(num_blocks=9, max_sequences=3)
    stream = Stream(it, max_tokens=12)
    stream.fill()
    step_at(it, 0.0)
    low = added(it, request(4, 20, priority=9))
    steps_until(it, lambda: low in it.running, stream, 0.0)
    num_urgent = len(stream.sent)
    assert steps_until(it, lambda: is_served(low), stream, 100.0) < 120
    assert low.num_preemptions <= 2
    assert len(stream.sent) > num_urgent, "the urgent requests went on"


def test_an_overdue_sequence_that_was_preempted_is_overdue_at_once() -> None:
    it = ageing_scheduler(num_blocks=6, max_sequences=2)
    high = added(it, request(8, 12))
    low = added(it, request(8, 12, text=1, priority=9))
    it.raise_overdue(0.0)
    it.raise_overdue(WAIT_S)
    assert (low.priority, low.is_overdue) == (0, True)
    while not low.num_preemptions:
        step_at(it, WAIT_S)
    it.finish(high)
    urgent = added(it, request(8, 2, text=2, priority=-5))
    it.raise_overdue(WAIT_S)
    assert low.priority == -5
    run(it)
    assert is_served(low)
    assert is_served(urgent)


def test_an_overdue_sequence_is_raised_to_the_highest_priority_that_arrives() -> None:
    it = ageing_scheduler(max_sequences=1)
    zero = Stream(it)
    zero.fill()
    low = added(it, request(4, 2, priority=9))
    step_at(it, 0.0)
    it.raise_overdue(WAIT_S)
    more_urgent = Stream(it, priority=-7)
    assert steps_until(it, lambda: is_served(low), more_urgent, WAIT_S) < 30


def test_ageing_changes_nothing_among_equal_priorities() -> None:
    plain, ageing = (ageing_scheduler(max_sequences=2, wait_s=wait_s) for wait_s in (float("inf"), 0.0))
    orders: list[list[int]] = []
    for it in (plain, ageing):
        sequences = [added(it, request(4, 2 + number % 3, text=number, adapters=[f"{number % 4}"])) for number in range(20)]
        order: list[int] = []
        for now in range(100):
            step_at(it, float(now))
            order += [n for n, s in enumerate(sequences) if s in it.running and n not in order]
        orders.append(order)
    assert orders[0] == orders[1]
    assert len(orders[0]) == 20


def test_a_raised_tenant_preempts_for_its_first_place_but_not_for_a_second() -> None:
    it = ageing_scheduler(max_sequences=2)
    first, second = (added(it, request(4, 30, tenant="urgent")) for _ in range(2))
    step_at(it, 0.0)
    low = added(it, request(4, 30, tenant="batch", priority=9))
    step_at(it, 0.0)
    assert list(it.running) == [first, second]
    step_at(it, WAIT_S)
    assert list(it.running) == [first, low]
    more = added(it, request(4, 30, tenant="batch", priority=9))
    step_at(it, WAIT_S)
    step_at(it, 2 * WAIT_S)
    assert list(it.running) == [first, low]
    assert more.is_raised


def test_all_choices_of_a_request_age_together() -> None:
    it = ageing_scheduler(max_sequences=1)
    stream = Stream(it)
    stream.fill()
    step_at(it, 0.0)
    choices = added_choices(it, request(4, 2, priority=9, num_choices=3))
    assert steps_until(it, lambda: all(map(is_served, choices)), stream, 0.0) in range(60, 160)
    assert all(choice.is_raised for choice in choices)


def test_a_sequence_that_ran_begins_to_wait_anew() -> None:
    ageing, sequence = Ageing(WAIT_S), Sequence(request(priority=9))
    ageing.begin(sequence)
    assert not ageing.overdue(0.0)
    ageing.end(sequence)
    assert not ageing.overdue(WAIT_S)
    ageing.begin(sequence)
    assert not ageing.overdue(1.5 * WAIT_S)
    assert not ageing.overdue(2.4 * WAIT_S)
    assert [*ageing.overdue(2.5 * WAIT_S)] == [sequence]
    ageing.end(sequence)
    assert not ageing.overdue(2.5 * WAIT_S)
    ageing.begin(sequence)
    assert [*ageing.overdue(2.5 * WAIT_S)] == [sequence]


@pytest.mark.slow
def test_a_server_answers_a_lower_priority_beside_an_unceasing_stream_of_a_higher_one(writer_model: Path, tmp_path: Path) -> None:
    flags = ["--model", str(writer_model), "--dtype", "float32", "--threads", "1", "--kv-cache-gib", "0.01"]
    flags += ["--max-batch", "1", "--max-priority-wait-s", "0.5"]
    with start_forked(tmp_path / "log", *flags) as server, ThreadPoolExecutor(8) as pool:
        is_over = threading.Event()

        def send_urgent() -> int:
            num_sent = 0
            while not is_over.is_set():
                server.generate(prompt="urgent", max_tokens=24, priority=0)
                num_sent += 1
            return num_sent

        senders = [pool.submit(send_urgent) for _ in range(6)]
        try:
            server.wait_for(running=1)
            low = server.generate(prompt="low", max_tokens=8, priority=9, timeout_s=LIMIT_S / 2)
        finally:
            is_over.set()
        assert low["usage"]["completion_tokens"] == 8
        assert all(sender.result() for sender in senders)
