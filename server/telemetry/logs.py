"""How the log is written: lines for people, or JSON for machines."""

import logging
import os
import sys
from collections.abc import Callable
from typing import Literal, TextIO

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from lori.printable import printable_lines

LogFormat = Literal["text", "json"]
OF_UVICORN = "color_message"
"""The message once more, for a terminal."""
OF_RAY = "_ray_timestamp_ns"
"""On each record, in a process of Ray's."""
KNOWN = frozenset([*RESERVED_ATTRS, OF_UVICORN, OF_RAY])
NO_BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
"""Environment variables by which huggingface_hub, transformers and `lori.embedded` show no progress, if they are there before
these are imported. The second is for transformers' reader of GGUF, which hears tqdm alone."""
TOLD = KNOWN | {"method", "route", "status"}


class TextFormatter(logging.Formatter):
    """Level, name and message, and after them what the record has beside these, but for what a request's message says already.

    Every line but the first of a record is set in, and what is not printed is escaped: no text of a file or a client can pass for
    a record of its own, or move a terminal's cursor.
    """

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return a record, with its traceback if it has one."""
        return printable_lines(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        """Return the line of a record."""
        said = [f"{key}={value!r}" for key, value in record.__dict__.items() if key not in TOLD]
        return " ".join([super().formatMessage(record), *said])


def configure_log(log_format: LogFormat, stream: TextIO | None = None, replica: str | None = None) -> None:
    """Make all loggers, uvicorn's too, write so to `stream`, or the standard error; each line names the `replica`, if any."""
    handler = logging.StreamHandler(stream or sys.stderr)
    if replica:
        handler.addFilter(_named(replica))
    handler.setFormatter(_json() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # A warning of Python's would be a line that is no JSON.
    logging.captureWarnings(log_format == "json")


def configure_start(log_format: LogFormat) -> None:
    """Make all loggers write so, see `configure_log`; no progress bar comes between but on a terminal, where the lines are text.

    To be called before anything that shows one is imported.
    """
    configure_log(log_format)
    if log_format == "json" or not sys.stderr.isatty():
        os.environ |= dict.fromkeys(NO_BARS, "1")


def _named(replica: str) -> Callable[[logging.LogRecord], bool]:
    def name(record: logging.LogRecord) -> bool:
        record.replica = replica
        return True

    return name


def _json() -> logging.Formatter:
    return JsonFormatter(
        "%(levelname)s %(name)s %(message)s",
        rename_fields={"levelname": "level", "name": "logger"},
        timestamp="time",
        reserved_attrs=[*KNOWN],
        json_ensure_ascii=True,
    )
