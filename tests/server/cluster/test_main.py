"""Refusals of `python -m server.cluster` before it starts anything of Ray's."""

import socket
from pathlib import Path

import pytest

from server.transport.sockets import free_port
from tests.server.live import LIMIT_S, run_main

pytestmark = pytest.mark.slow


def refused(log: Path, *flags: str) -> tuple[int, str]:
    """Return the exit code and the output of a cluster that does not start."""
    process = run_main(log, *flags, module="server.cluster")
    try:
        return process.wait(LIMIT_S), log.read_text()
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--keys", "none.toml"], 1, "none.toml is not a sound key file:\n  it cannot be read: No such file or directory"),
        (["--host", "0.0.0.0"], 2, "--host: '0.0.0.0' lets other machines in, and there are no keys"),
        (["--host", "10.0.0.5", "--open"], 2, "--host is '10.0.0.5', expected 127.0.0.1, localhost or 0.0.0.0"),
        (["--max-replicas", "1", "--replicas", "2"], 2, "--max-replicas is 1, expected --replicas, 2, or more"),
    ],
)
def test_wrong_settings_are_refused_at_once(flags: list[str], code: int, message: str, tmp_path: Path) -> None:
    returned, log = refused(tmp_path / "log", "--port", str(free_port()), *flags)
    assert returned == code
    assert log.startswith(f"error: {message}")
    assert "Traceback" not in log


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = f"error: cannot listen on 127.0.0.1:{port}: Address already in use; pass another --port\n"
        assert refused(tmp_path / "log", "--port", str(port)) == (1, message)
