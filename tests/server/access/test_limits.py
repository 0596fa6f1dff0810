"""Limits of a tenant: requests a minute, and answers at once."""

import math
import threading
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import pytest

from server.access.caller import Caller
from server.access.limits import MINUTE_S, Limiter, RateLimitedError, RateLimiter


@dataclass
class Clock:
    """A clock that stands still until a test moves it."""

    now: float = 1_000_000.5

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def refused(limiter: RateLimiter, caller: Caller, num_requests: int = 1) -> RateLimitedError:
    with pytest.raises(RateLimitedError) as caught:
        limiter.count(caller, num_requests)
    return caught.value


def refused_place(limiter: Limiter, caller: Caller, num_answers: int = 1) -> RateLimitedError:
    with pytest.raises(RateLimitedError) as caught, limiter.places(caller, num_answers):
        pass
    return caught.value


def test_the_limit_holds_for_a_sliding_minute(clock: Clock) -> None:
    limiter, acme = RateLimiter(clock=clock), Caller(tenant="acme", requests_per_minute=3)
    for _ in range(3):
        limiter.count(acme)
        clock.now += 10
    error = refused(limiter, acme)
    assert error.retry_after_s == 30
    assert str(error) == "tenant 'acme' may send 3 requests a minute, and has sent them; try again in 30 s"
    clock.now += 12.3
    assert refused(limiter, acme).retry_after_s == math.ceil(17.7)
    clock.now += 18
    limiter.count(acme)
    assert 1 <= refused(limiter, acme).retry_after_s <= 10


def test_a_request_refused_for_the_rate_does_not_count(clock: Clock) -> None:
    limiter, acme = RateLimiter(clock=clock), Caller(tenant="acme", requests_per_minute=4)
    for _ in range(2):
        limiter.count(acme)
        clock.now += 30
    for _ in range(100):
        assert "4 requests a minute" in str(refused(limiter, acme, 3))
    limiter.count(acme, 2)
    for _ in range(100):
        refused(limiter, acme)
    clock.now += 1
    limiter.count(acme)


def test_several_requests_are_counted_together_or_not_at_all(clock: Clock) -> None:
    limiter, acme = RateLimiter(clock=clock), Caller(tenant="acme", requests_per_minute=10)
    for _ in range(8):
        limiter.count(acme)
        clock.now += 1
    assert refused(limiter, acme, 6).retry_after_s == MINUTE_S - 8 + 3, "when four of the eight requests are a minute old"
    limiter.count(acme, 2)
    limiter.count(acme, 0)
    clock.now += 60 - 8 + 3.1
    refused(limiter, acme, 5)
    limiter.count(acme, 4)


def test_no_more_requests_are_remembered_than_the_limit(clock: Clock) -> None:
    limiter, acme = RateLimiter(clock=clock), Caller(tenant="acme", requests_per_minute=50)
    num_sent = 0
    for _ in range(2000):
        clock.now += 0.7
        with suppress(RateLimitedError):
            limiter.count(acme)
            num_sent += 1
        assert len(limiter._sent["acme"]) <= 50
    assert 50 * 23 <= num_sent <= 50 * 24, "of the 2857 that were sent in 23 minutes and a third"


def test_ingresses_share_a_limit_and_each_allows_its_part(clock: Clock) -> None:
    acme = Caller(tenant="acme", requests_per_minute=5)
    ingresses = [RateLimiter(3, clock) for _ in range(3)]
    for ingress in ingresses:
        assert ingress.limit(acme) == 2
        for _ in range(2):
            ingress.count(acme)
        message = "tenant 'acme' may send 2 requests a minute by each of 3 ingresses, and has sent them; try again in 60 s"
        assert str(refused(ingress, acme)) == message
    assert ingresses[0].limit(Caller(tenant="other")) is None


def test_a_tenant_that_sent_nothing_for_a_minute_is_forgotten(clock: Clock) -> None:
    limiter = RateLimiter(clock=clock)
    for number in range(1000):
        limiter.count(Caller(tenant=f"tenant-{number}", requests_per_minute=2))
    clock.now += 40
    limiter.count(Caller(tenant="tenant-0", requests_per_minute=2))
    clock.now += 21
    limiter.count(Caller(tenant="acme", requests_per_minute=1))
    assert set(limiter._sent) == {"tenant-0", "acme"}
    assert len(limiter._sent["tenant-0"]) <= 2
    clock.now += 61
    limiter.count(Caller(tenant="acme", requests_per_minute=1))
    assert set(limiter._sent) == {"acme"}


def test_counting_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []
    monkeypatch.setattr(threading.Thread, "start", started.append)
    RateLimiter().count(Caller(tenant="acme", requests_per_minute=1))
    assert not started


def test_places_are_given_back_however_the_block_ends() -> None:
    limiter, acme = Limiter(), Caller(tenant="acme", max_requests=2)
    for _ in range(3):
        with pytest.raises(KeyError), limiter.places(acme):
            raise KeyError
    with ExitStack() as held:
        for _ in range(2):
            held.enter_context(limiter.places(acme))
        error = refused_place(limiter, acme)
        assert error.retry_after_s == 1
        assert str(error) == "tenant 'acme' has 2 answers under way, and may have 2; try again"
    with limiter.places(acme, 2):
        pass
    assert not limiter._under_way, "a tenant without answers under way has no entry"


def test_tenants_are_counted_apart_and_the_keys_of_one_together(clock: Clock) -> None:
    rate, limiter = RateLimiter(clock=clock), Limiter()
    first, second = (Caller(tenant="acme", key_id=name, requests_per_minute=1, max_requests=1) for name in ("a", "b"))
    other = Caller(tenant="other", requests_per_minute=1, max_requests=1)
    with limiter.places(first), limiter.places(other):
        assert "under way" in str(refused_place(limiter, second))
    for caller in (first, other):
        rate.count(caller)
    assert "a minute" in str(refused(rate, second))
    clock.now += 61
    rate.count(second)


def test_a_caller_without_limits_is_never_refused() -> None:
    rate, limiter = RateLimiter(), Limiter()
    with ExitStack() as held:
        for _ in range(1000):
            rate.count(Caller())
            held.enter_context(limiter.places(Caller()))
    rate.count(Caller(is_admin=True))
    assert not rate._sent


def test_new_limits_hold_at_once(clock: Clock) -> None:
    rate, limiter = RateLimiter(clock=clock), Limiter()
    rate.count(Caller(tenant="acme", requests_per_minute=1))
    clock.now += 10
    rate.count(Caller(tenant="acme", requests_per_minute=2))
    assert refused(rate, Caller(tenant="acme", requests_per_minute=1)).retry_after_s == MINUTE_S
    with limiter.places(Caller(tenant="acme", max_requests=5)):
        refused_place(limiter, Caller(tenant="acme", max_requests=1))


def test_several_places_are_held_together_or_not_at_all() -> None:
    limiter, acme = Limiter(), Caller("acme", max_requests=4)
    with limiter.places(acme, 3):
        assert "3 answers under way, and may have 4" in str(refused_place(limiter, acme, 2))
        with limiter.places(acme, 1):
            pass
