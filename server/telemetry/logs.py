"""Log formats: lines for people, or JSON for machines."""

import logging
import os
import sys
from collections.abc import Callable
from typing import TextIO

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from lori.printable import printable_lines
from server.settings import LogFormat

UVICORN_FIELD = "color_message"
"""A field of uvicorn's records: the message once more, for a terminal."""
RAY_FIELD = "_ray_timestamp_ns"
"""A field of every record in a process of Ray."""
KNOWN_FIELDS = frozenset([*RESERVED_ATTRS, UVICORN_FIELD, RAY_FIELD])
NO_BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
"""Environment variables that disable the progress bars of huggingface_hub, transformers and `lori.embedded`.

They must be set before the import. The second is for transformers' GGUF reader, which only knows tqdm's."""
SHOWN_FIELDS = KNOWN_FIELDS | {"method", "route", "status"}


class TextFormatter(logging.Formatter):
    """Formatter of lines for people: level, name, message, and the record's other fields that the message does not contain.

    Further lines of a record are indented, and unprintable characters are escaped: no text from a file or a client can look like
    a record of its own, or move a terminal's cursor.
    """

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as text, with its traceback if it has one."""
        return printable_lines(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        """Return the line of a record."""
        fields = [f"{key}={value!r}" for key, value in record.__dict__.items() if key not in SHOWN_FIELDS]
        return " ".join([super().formatMessage(record), *fields])


def configure_log(log_format: LogFormat, stream: TextIO | None = None, replica: str | None = None) -> None:
    """Configure all loggers, also uvicorn's, to write to `stream` or standard error. Each line names the `replica`, if any."""
    handler = logging.StreamHandler(stream or sys.stderr)
    if replica:
        handler.addFilter(_replica_filter(replica))
    handler.setFormatter(_json() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # Otherwise Python's warnings would be lines that are no JSON.
    logging.captureWarnings(log_format == "json")


def configure_start(log_format: LogFormat) -> None:
    """Configure all loggers as `configure_log` does. Shows progress bars only for text on a terminal.

    Call it before importing anything that shows progress bars.
    """
    configure_log(log_format)
    if log_format == "json" or not sys.stderr.isatty():
        os.environ |= dict.fromkeys(NO_BARS, "1")


def _replica_filter(replica: str) -> Callable[[logging.LogRecord], bool]:
    def name(record: logging.LogRecord) -> bool:
        record.replica = replica
        return True

    return name


def _json() -> logging.Formatter:
    return JsonFormatter(
        "%(levelname)s %(name)s %(message)s",
        rename_fields={"levelname": "level", "name": "logger"},
        timestamp="time",
        reserved_attrs=[*KNOWN_FIELDS],
        json_ensure_ascii=True,
    )
