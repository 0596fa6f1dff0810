"""What may never end is waited for no longer than it may take."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Found = TypeVar("Found")


def within(seconds: float, act: Callable[[], Found]) -> Found:
    """Returns what `act` returns, or raises what it raises. Raises `TimeoutError` where it takes longer.

    Then it is left to itself, in a thread that keeps no process alive.
    """
    done: Future[Found] = Future()

    def run() -> None:
        try:
            done.set_result(act())
        except BaseException as error:  # noqa: BLE001  # it is raised where it is waited for
            done.set_exception(error)

    threading.Thread(target=run, name="remote", daemon=True).start()
    return done.result(seconds)
