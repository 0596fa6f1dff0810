"""`python -m tests.server.held_start LINE`: the server, which begins to hold Python's lock for ever once it has logged a LINE.

It stands for an import or a kernel that takes long, in which no handler of Python's runs.
"""

import ctypes
import logging
import sys

from server.__main__ import main

emit = logging.StreamHandler.emit


def emit_and_hold(handler: "logging.StreamHandler[object]", record: logging.LogRecord) -> None:
    """Writes a record, and does not return from the one that is waited for."""
    emit(handler, record)
    if record.getMessage().startswith(LINE):
        ctypes.PyDLL(None).sleep(3600)


if __name__ == "__main__":
    LINE = sys.argv.pop(1)
    logging.StreamHandler.emit = emit_and_hold  # type: ignore[method-assign]  # a test's own
    sys.exit(main())
