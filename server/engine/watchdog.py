"""The watchdog of a process: ends it when a step of the engine, or its own end, takes too long.

Python's `faulthandler` does it, from a thread that needs no lock of Python's, for a kernel that never returns may hold them. It
writes the stacks of all threads to standard error, as plain text whatever the log's format is, and ends the process with exit
code 1. There is one timer a process. Knows no engine.
"""

import faulthandler
import time

STDERR = 2
REARM_S = 1.0
"""Setting the timer starts a thread: 50 us, and on a machine that is busy some milliseconds. So not at each step."""


class Watchdog:
    """Ends the process when a step takes longer than `limit_s`, or up to `REARM_S` more; never where that is 0.

    For the engine's thread alone.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._armed_at: float | None = None

    @property
    def slack_s(self) -> float:
        """Seconds in which the engine may still rest without `disarm`; 0 where it has to be called, or was."""
        return 0.0 if self._armed_at is None else max(0.0, self._armed_at + REARM_S - time.monotonic())

    def begin_step(self) -> None:
        """Give the step that begins now its time."""
        if self._limit_s and not self.slack_s:
            self._armed_at = time.monotonic()
            end_process_after(self._limit_s + REARM_S)

    def disarm(self) -> None:
        """Let the engine rest for as long as it likes."""
        if self._armed_at is not None:
            self._armed_at = None
            faulthandler.cancel_dump_traceback_later()


def end_process_after(seconds: float) -> None:
    """End the process in `seconds`, unless it has ended by then, or the timer is set anew."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=STDERR)
