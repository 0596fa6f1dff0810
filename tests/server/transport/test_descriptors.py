"""File descriptors: the server raises its limit as far as it may, and goes on if they run out."""

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from server.transport.connections import is_readable
from tests.server.live import run_main, wait_until


@contextmanager
def nothing_can_be_opened() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, limits[1]))  # with a limit of 0 poll() accepts no descriptor
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_received_bytes_are_seen_without_free_descriptors() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, nothing_can_be_opened():
        with pytest.raises(OSError, match="Too many open files"):
            os.open(os.devnull, os.O_RDONLY)
        silent = is_readable(ours)
        theirs.send(b"G")
        assert (silent, is_readable(ours)) == (False, True)


def test_a_connection_that_has_ended_is_readable_and_one_that_we_closed_is_not() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    assert is_readable(ours)
    ours.close()
    assert not is_readable(ours)


def test_the_server_may_open_as_much_as_its_hard_limit_says(tmp_path: Path) -> None:
    # The shell replaces itself by the server.
    process = run_main(tmp_path / "log", "--port", "0", within=("sh", "-c", 'ulimit -Sn 200; exec "$@"', "sh"))

    def soft() -> str:
        lines = Path(f"/proc/{process.pid}/limits").read_text().splitlines()
        [limit] = [line for line in lines if line.startswith("Max open files")]
        return limit.split()[3]

    try:
        wait_until(lambda: soft() == "200", "the shell")
        wait_until(lambda: soft() == str(resource.getrlimit(resource.RLIMIT_NOFILE)[1]), "the server")
    finally:
        process.kill()
        process.wait()
