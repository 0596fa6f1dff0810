"""`python -m tests.server.held_start LINE`: the server, which holds Python's global lock for an hour once it has logged LINE.

It stands for a long import or kernel, during which no Python signal handler runs.
"""

import ctypes
import logging
import sys

from server.__main__ import main

emit = logging.StreamHandler.emit


def emit_and_hold(handler: "logging.StreamHandler[object]", record: logging.LogRecord) -> None:
    """Write a record, and hold the lock if its message begins with LINE."""
    emit(handler, record)
    if record.getMessage().startswith(LINE):
        ctypes.PyDLL(None).sleep(3600)


if __name__ == "__main__":
    LINE = sys.argv.pop(1)
    logging.StreamHandler.emit = emit_and_hold  # type: ignore[method-assign]  # a test's own
    sys.exit(main())
