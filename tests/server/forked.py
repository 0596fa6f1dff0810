"""Servers that are forked from a process which has imported what they import: else as those of `tests.server.live`.

For tests of a server that runs or ends. `python -m tests.server.forked SOCKET` is the process that they are forked from.
"""

import array
import atexit
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from functools import cache
from pathlib import Path

from tests.server.live import LIMIT_S, REPOSITORY, Live, environment, start


class Forked:
    """A process that is no child of ours; another reports its end. As `subprocess.Popen`."""

    def __init__(self, report: socket.socket) -> None:
        self._report = report
        self._returncode: int | None = None
        self.pid = self._read(LIMIT_S)

    def _read(self, timeout: float | None) -> int:
        if not select.select([self._report], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("a forked server", timeout or 0)
        [number] = array.array("q", self._report.recv(8))
        return int(number)

    def wait(self, timeout: float | None = None) -> int:
        if self._returncode is None:
            self._returncode = self._read(timeout)
            self._report.close()
        return self._returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has ended just now, and its report is on the way
                os.kill(self.pid, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_forked(log: Path, *flags: str, module: str = "server") -> Forked:
    """Starts what `tests.server.live.run_main` starts."""
    report, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, log.open("wb") as file:
        order = json.dumps([module, flags, environment()]).encode()
        socket.send_fds(_parent(), [order], [file.fileno(), theirs.fileno()])
    return Forked(report)


def start_forked(log: Path, *flags: str, module: str = "server") -> AbstractContextManager[Live]:
    """Runs a server as `tests.server.live.start` does."""
    return start(log, *flags, module=module, run=run_forked)


@cache
def _parent() -> socket.socket:
    """Return the socket of the process that servers are forked from, started when it is first asked for."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-m", "tests.server.forked", str(theirs.fileno())]
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment(), stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
        )

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def _forks(orders: socket.socket) -> Iterator[tuple[str, list[str]]]:
    """Yield, in each forked process, the module and flags that it is to run. Ends in the parent when nobody orders any more."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        order, descriptors, _, _ = socket.recv_fds(orders, 1 << 20, 2)
        if not order:
            return
        if os.fork() == 0:
            orders.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            log, report = descriptors[0], socket.socket(fileno=descriptors[1])
            if pid := os.fork():
                os.close(log)
                _report_end(pid, report)
            report.close()
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)
            module, flags, variables = json.loads(order)
            os.environ.clear()
            os.environ.update(variables)
            yield module, flags
            return
        for each in descriptors:
            os.close(each)


def _report_end(pid: int, report: socket.socket) -> None:
    """Say who runs, and later how it ended; does not return."""
    report.send(array.array("q", [pid]).tobytes())
    _, status = os.waitpid(pid, 0)
    report.send(array.array("q", [os.waitstatus_to_exitcode(status)]).tobytes())
    os._exit(0)


def _end(code: int) -> None:
    """End as the interpreter does, but for taking apart every module, which copies what is shared with the parent."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Import what servers do, and fork whatever is ordered."""
    import server.serving  # noqa: F401, PLC0415  # takes seconds, and whoever imports this module need not wait

    assert len(os.listdir("/proc/self/task")) == 1, "a thread that no fork would have"
    for module, flags in _forks(socket.socket(fileno=int(sys.argv[1]))):
        sys.argv = [module, *flags]
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if not isinstance(end.code, int):
                raise
            _end(end.code)
        _end(0)
    os._exit(0)  # here, too, nobody need take apart what was imported


if __name__ == "__main__":
    main()
