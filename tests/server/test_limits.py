"""What a tenant may ask for in a minute, and at once."""

import math
import threading
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from server.access.caller import Caller
from server.access.limits import Limiter, RateLimitedError


@dataclass
class Clock:
    """Stands until it is set on."""

    now: float = 1_000_000.5

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def take(limiter: Limiter, caller: Caller) -> None:
    with limiter.places(caller):
        pass


def refused(limiter: Limiter, caller: Caller) -> RateLimitedError:
    with pytest.raises(RateLimitedError) as caught:
        take(limiter, caller)
    return caught.value


def test_a_minute_has_so_many_requests_and_moves(clock: Clock) -> None:
    limiter, acme = Limiter(clock), Caller(tenant="acme", requests_per_minute=3)
    for _ in range(3):
        take(limiter, acme)
        clock.now += 10
    error = refused(limiter, acme)
    assert error.retry_after_s == 30
    assert str(error) == "tenant 'acme' may send 3 requests a minute, and has sent them; try again in 30 s"
    clock.now += 12.3
    assert refused(limiter, acme).retry_after_s == math.ceil(17.7)
    clock.now += 18
    take(limiter, acme)
    assert 1 <= refused(limiter, acme).retry_after_s <= 10


def test_a_refused_request_does_not_count(clock: Clock) -> None:
    limiter, acme = Limiter(clock), Caller(tenant="acme", requests_per_minute=2, max_requests=1)
    with limiter.places(acme):
        for _ in range(5):
            assert "under way" in str(refused(limiter, acme))
    take(limiter, acme)
    for _ in range(5):
        assert "a minute" in str(refused(limiter, acme))
    clock.now += 61
    take(limiter, acme)


def test_whoever_has_sent_nothing_for_a_minute_is_forgotten(clock: Clock) -> None:
    limiter = Limiter(clock)
    for number in range(1000):
        take(limiter, Caller(tenant=f"tenant-{number}", requests_per_minute=2))
    clock.now += 40
    take(limiter, Caller(tenant="tenant-0", requests_per_minute=2))
    clock.now += 21
    take(limiter, Caller(tenant="acme", requests_per_minute=1))
    assert set(limiter._sent) == {"tenant-0", "acme"}
    assert len(limiter._sent["tenant-0"]) <= 2
    clock.now += 61
    take(limiter, Caller(tenant="acme", requests_per_minute=1))
    assert set(limiter._sent) == {"acme"}


def test_counting_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []
    monkeypatch.setattr(threading.Thread, "start", started.append)
    take(Limiter(), Caller(tenant="acme", requests_per_minute=1))
    assert not started


def test_places_are_given_back_however_the_block_ends() -> None:
    limiter, acme = Limiter(), Caller(tenant="acme", max_requests=2)
    for _ in range(3):
        with pytest.raises(KeyError), limiter.places(acme):
            raise KeyError
    with ExitStack() as held:
        for _ in range(2):
            held.enter_context(limiter.places(acme))
        error = refused(limiter, acme)
        assert error.retry_after_s == 1
        assert str(error) == "tenant 'acme' has 2 answers under way, and may have 2; try again"
    take(limiter, acme)
    assert not limiter._under_way, "nothing is kept of who has left"


def test_tenants_do_not_count_for_each_other_but_their_keys_do(clock: Clock) -> None:
    limiter = Limiter(clock)
    first, second = (Caller(tenant="acme", key_id=name, requests_per_minute=1, max_requests=1) for name in ("a", "b"))
    other = Caller(tenant="other", requests_per_minute=1, max_requests=1)
    with limiter.places(first), limiter.places(other):
        assert "under way" in str(refused(limiter, second))
    assert "a minute" in str(refused(limiter, second))
    clock.now += 61
    take(limiter, second)


def test_who_has_no_limits_has_none() -> None:
    limiter = Limiter()
    with ExitStack() as held:
        for _ in range(1000):
            held.enter_context(limiter.places(Caller()))
    take(limiter, Caller(is_admin=True))


def test_new_limits_hold_at_once(clock: Clock) -> None:
    limiter = Limiter(clock)
    take(limiter, Caller(tenant="acme", requests_per_minute=1))
    take(limiter, Caller(tenant="acme", requests_per_minute=2))
    with limiter.places(Caller(tenant="acme", max_requests=5)):
        refused(limiter, Caller(tenant="acme", max_requests=1))
    assert clock.now


def test_answers_are_under_way_and_requests_are_counted_by_the_minute() -> None:
    limiter = Limiter()
    acme = Caller("acme", max_requests=4, requests_per_minute=2)
    with limiter.places(acme, 1, num_answers=3):
        with pytest.raises(RateLimitedError, match="3 answers under way, and may have 4"), limiter.places(acme, 1, num_answers=2):
            pass
        with limiter.places(acme, 1, num_answers=1):
            pass


def test_several_places_are_all_there_or_none_and_count_as_so_many() -> None:
    limiter, caller = Limiter(), Caller(tenant="acme", max_requests=3, requests_per_minute=4)
    with limiter.places(caller, 2):
        with pytest.raises(RateLimitedError, match="2 answers under way, and may have 3"), limiter.places(caller, 2):
            pass
        with limiter.places(caller):
            pass
    with pytest.raises(RateLimitedError, match="4 requests a minute"), limiter.places(caller, 2):
        pass
    with limiter.places(caller):  # the two that were refused did not count
        pass
