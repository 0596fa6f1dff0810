"""`python -m tests.server.dying_server`: the server, whose parts die or get stuck when a test demands it.

A prompt names the deed of the engine; the content of the key file names that of the key ring, which polls it.
"""

import ctypes
import sys
import threading
from collections.abc import Callable, Mapping

from server import http_server
from server.__main__ import main
from server.access.key_ring import KeyRing
from server.engine.engine import Engine

step, poll = Engine.step, KeyRing.poll


def die() -> None:
    """Fail with an error that no request can cause."""
    raise MemoryError("out of luck")


def die_and_leave_a_thread() -> None:
    """Fail, and leave a thread that keeps the process from ending."""
    threading.Thread(target=threading.Event().wait, daemon=False).start()
    http_server.LAST_RESORT_S = http_server.FAILED_NOTICE_S + 1
    die()


def wait() -> None:
    """Wait for ever, while other threads run."""
    threading.Event().wait()


def hold_the_lock() -> None:
    """Hold Python's global lock for an hour, as a kernel that never returns may: no other thread runs."""
    ctypes.PyDLL(None).sleep(3600)


DEEDS: Mapping[str, Callable[[], None]] = {
    "die": die,
    "die and leave a thread": die_and_leave_a_thread,
    "wait": wait,
    "hold the lock": hold_the_lock,
}


def dying_step(engine: Engine) -> None:
    """Do the deed that a request's prompt names, then run the step."""
    for sequence in engine._replies:
        if deed := DEEDS.get(sequence.request.prompt_text):
            deed()
    step(engine)


def dying_poll(ring: KeyRing) -> None:
    """Fail if the key file holds only the comment `# die`."""
    if ring.path.read_text() == "# die":
        die()
    poll(ring)


if __name__ == "__main__":
    Engine.step = dying_step  # type: ignore[method-assign]
    KeyRing.poll = dying_poll  # type: ignore[method-assign]
    sys.exit(main())
