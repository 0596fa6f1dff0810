"""The watchdog's timer, with a fake `faulthandler` and a clock that a test sets."""

from typing import Any

import pytest

from server.engine.thread import REARM_S, Watchdog


class FakeTimer:
    """A fake of `faulthandler` that records the seconds of each timer, or None for a cancelled one."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.calls: list[float | None] = []

    def dump_traceback_later(self, seconds: float, **options: Any) -> None:
        assert options == {"exit": True, "file": 2}
        self.calls.append(seconds)

    def cancel_dump_traceback_later(self) -> None:
        self.calls.append(None)


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> FakeTimer:
    fake = FakeTimer()
    monkeypatch.setattr("server.engine.thread.faulthandler", fake)
    monkeypatch.setattr("time.monotonic", lambda: fake.now)
    return fake


def test_the_timer_is_set_once_a_second_and_every_step_has_at_least_its_limit(timer: FakeTimer) -> None:
    watchdog = Watchdog(5.0)
    for _ in range(100):
        watchdog.begin_step()
        timer.now += REARM_S / 40
    assert timer.calls == [5.0 + REARM_S] * 3


def test_an_engine_may_rest_for_the_slack_of_the_timer(timer: FakeTimer) -> None:
    watchdog = Watchdog(0.1)
    assert watchdog.slack_s == 0
    watchdog.begin_step()
    timer.now += REARM_S / 4
    assert watchdog.slack_s == pytest.approx(3 * REARM_S / 4)
    timer.now += REARM_S
    assert watchdog.slack_s == 0, "a long step leaves no slack, as the timer could fire during a rest"
    watchdog.disarm()
    watchdog.disarm()
    assert watchdog.slack_s == 0
    assert timer.calls == [0.1 + REARM_S, None]


def test_without_a_limit_there_is_no_timer(timer: FakeTimer) -> None:
    watchdog = Watchdog(0)
    watchdog.begin_step()
    watchdog.disarm()
    assert timer.calls == []
    assert watchdog.slack_s == 0
