"""Text of files and clients in the text log: it can neither pass for a record nor move a terminal's cursor."""

import json
import logging
import re
from io import StringIO
from pathlib import Path

import pytest

from lori.base_model import BaseModel
from lori.config import CONFIG_FILE
from lori.errors import AdapterFormatError
from lori.printable import MARGIN, printable, printable_lines
from server.access.keys import KeyFileError
from server.telemetry.logs import TextFormatter
from tests.server.forked import run_forked, start_forked
from tests.server.live import LIMIT_S
from tests.server.rig import write_adapter

FORGED = "x\nERROR server: forged\r\n\x1b[31m\x1b[2J\x85\u2028\u202e\x00\x7f\x9b\ud800"
RECORD = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL) [\w.]+: ")


@pytest.fixture
def stream() -> StringIO:
    return StringIO()


@pytest.fixture
def logger(stream: StringIO) -> logging.Logger:
    """Return a logger that writes in the text format, to `stream` only."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextFormatter())
    logger = logging.Logger("a.logger")
    logger.addHandler(handler)
    return logger


def records(text: str) -> list[str]:
    """Return the lines that begin a record. Fail unless all other lines are indented, and all characters are printable."""
    lines = text.split("\n")
    assert lines.pop() == ""
    assert all(line.isprintable() for line in lines)
    assert all(RECORD.match(line) or line.startswith(MARGIN) for line in lines)
    return [line for line in lines if not line.startswith(MARGIN)]


def test_no_text_in_a_message_begins_a_record(logger: logging.Logger, stream: StringIO) -> None:
    logger.warning("adapter %s: %s", FORGED, ValueError(FORGED))
    logger.warning("plain", extra={"request_id": FORGED, "path": FORGED})
    logger.warning(f"inline {FORGED}")  # as libraries do
    assert len(records(stream.getvalue())) == 3
    assert r"\x1b[31m\x1b[2J\x85\u2028\u202e\x00\x7f\x9b\ud800" in stream.getvalue()


def test_a_traceback_stays_readable_and_its_error_begins_no_record(logger: logging.Logger, stream: StringIO) -> None:
    try:
        raise ValueError(FORGED)
    except ValueError:
        logger.exception("it failed", stack_info=True)
    assert records(stream.getvalue()) == ["ERROR a.logger: it failed"]
    lines = stream.getvalue().split("\n")
    assert f"{MARGIN}Traceback (most recent call last):" in lines
    assert f"{MARGIN}    raise ValueError(FORGED)" in lines
    assert f"{MARGIN}ERROR server: forged\\r" in lines


def test_reports_of_several_lines_keep_them(logger: logging.Logger, stream: StringIO) -> None:
    for error in (AdapterFormatError("a\nb", ["one", FORGED]), KeyFileError("a\nb", ["one", FORGED])):
        logger.error("a report: %s", "\n".join(error.lines))
        assert len(error.lines) == 3
        assert all(line.isprintable() for line in [*error.lines, str(error)])
    assert len(records(stream.getvalue())) == 2
    assert f"{MARGIN}  one\n" in stream.getvalue()


def test_printable_text_is_left_alone() -> None:
    for text in ("", "a b", "ärger 日本語 🎉", r"\n"):
        assert printable(text) == printable_lines(text) == text


@pytest.mark.slow
def test_a_config_cannot_forge_a_line_of_the_server_s_log(writer_model: Path, writer: BaseModel, tmp_path: Path) -> None:
    """Regression: line breaks in a config's keys reached the log unescaped."""
    write_adapter(tmp_path / "store" / "math", writer, seed=1)
    write_adapter(tmp_path / "store" / "evil", writer, seed=2)
    file = tmp_path / "store" / "evil" / CONFIG_FILE
    text = FORGED.replace("\ud800", "")
    document = json.loads(file.read_text())
    file.write_text(json.dumps(document | {text: 1, "r": 0, "lori": document["lori"] | {text: 1}}))
    odd = tmp_path / "store" / "Odd\x1b[31m\nINFO server: forged"
    odd.mkdir()
    (odd / CONFIG_FILE).write_text("{}")
    flags = ["--model", str(writer_model), "--adapters", str(tmp_path / "store"), "--dtype", "float32", "--threads", "1"]
    with start_forked(tmp_path / "log", *flags, "--kv-cache-gib", "0.01") as server:
        server.client.get("/no%1B%0AINFO server: forged", headers={"x-request-id": "a\tb"})
        server.client.post("/generate", json={"prompt": "x", "adapter": text})
        assert [row["name"] for row in server.client.get("/adapters").json()["faulty"]] == [printable(odd.name), "evil"]
    log = (tmp_path / "log").read_bytes().decode()
    carriers = ("NOT SERVED", "GET", "INFO server.request: POST /generate 404 ")
    assert all("forged" not in line or any(part in line for part in carriers) for line in records(log))
    assert len([line for line in records(log) if "NOT SERVED" in line]) == 2
    assert run_forked(tmp_path / "listed", "list", str(tmp_path / "store"), module="lori").wait(LIMIT_S) == 1
    text = (tmp_path / "listed").read_text()
    assert "evil" in text
    assert "\x1b" not in text
    assert not any(line.startswith("INFO server: forged") for line in text.splitlines())


@pytest.mark.slow
def test_an_error_that_ends_the_start_is_escaped_likewise(writer_model: Path, writer: BaseModel, tmp_path: Path) -> None:
    write_adapter(tmp_path / "store" / "math", writer, seed=1)
    file = tmp_path / "store" / "math" / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rank_pattern": {"a\nerror: forged\x1b[31m": 0}}))
    flags = ["--port", "0", "--model", str(writer_model), "--adapters", str(tmp_path / "store"), "--strict"]
    assert run_forked(tmp_path / "log", *flags).wait(LIMIT_S) == 1
    text = (tmp_path / "log").read_text()
    assert "\x1b" not in text
    assert not any(line.startswith("error: forged") for line in text.splitlines())
    assert r"a\nerror: forged\x1b[31m" in text
