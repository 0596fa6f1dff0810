"""Ctrl+C during start-up: SIGINT ends the process at once, without a traceback.

Python's own handler runs between two of its instructions only. An import of torch, or the reading of a model, is one for seconds,
and the KeyboardInterrupt that comes then is a traceback through the innards of what was imported.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def end_by_interrupt() -> None:
    """Have SIGINT end this process as the system does, until another handler is set. Call it in the main thread."""
    if os.getpid() == 1:  # from the first process of a container the system keeps signals without a handler
        signal.signal(signal.SIGINT, lambda number, _: os._exit(128 + number))
    else:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def cleaning_up_on_interrupt() -> Iterator[None]:
    """Have SIGINT raise `KeyboardInterrupt` in the block, so that it removes what it has half made; then end by SIGINT.

    Does nothing outside the main thread, nor where SIGINT has a Python handler, as it has in process 1.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    except KeyboardInterrupt:
        signal.raise_signal(signal.SIGINT)
