"""Ctrl+C during start-up: SIGINT ends the process at once, without a traceback.

Python's own handler runs only between two bytecode instructions. An import of torch, or the loading of a model, can be one
instruction for seconds, and the late KeyboardInterrupt then prints a traceback through the internals of the imported package.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def end_by_interrupt() -> None:
    """Make SIGINT end this process by the system's default action, until another handler is set. Call from the main thread."""
    if os.getpid() == 1:  # the kernel does not deliver signals without a handler to the first process of a container
        signal.signal(signal.SIGINT, lambda number, _: os._exit(128 + number))
    else:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def cleaning_up_on_interrupt() -> Iterator[None]:
    """Make SIGINT raise `KeyboardInterrupt` in the block, so that the block can clean up; then end the process by SIGINT.

    Does nothing outside the main thread, or if SIGINT has a Python handler already (as in process 1).
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
