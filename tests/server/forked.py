"""Servers that are forked from a process with all imports done. In everything else they equal those of `tests.server.live`.

For tests of a running or ending server. `python -m tests.server.forked SOCKET` is the process that forks them.
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
    """A server process with the interface of `subprocess.Popen`. It is not our child: its parent reports its end by a socket."""

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
            with suppress(ProcessLookupError):  # the process has just ended, and its report is on the way
                os.kill(self.pid, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_forked(log: Path, *flags: str, module: str = "server") -> Forked:
    """Start the same server as `tests.server.live.run_main`, forked."""
    report, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, log.open("wb") as file:
        order = json.dumps([module, flags, environment()]).encode()
        socket.send_fds(_parent(), [order], [file.fileno(), theirs.fileno()])
    return Forked(report)


def start_forked(log: Path, *flags: str, module: str = "server") -> AbstractContextManager[Live]:
    """Run a forked server until the block ends, as `tests.server.live.start` does."""
    return start(log, *flags, module=module, run=run_forked)


@cache
def _parent() -> socket.socket:
    """Return the socket of the process that forks servers. The first call starts that process."""
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
    """Yield, in each forked process, the module and flags to run. In the parent, return when the other end of `orders` closes."""
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
    """Send the pid of the server, and its exit code once it ends. Does not return."""
    report.send(array.array("q", [pid]).tobytes())
    _, status = os.waitpid(pid, 0)
    report.send(array.array("q", [os.waitstatus_to_exitcode(status)]).tobytes())
    os._exit(0)


def _end(code: int) -> None:
    """End as the interpreter does, without tearing down the modules: that would copy memory shared with the parent."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Import the server's modules, and fork each server that is ordered."""
    import server.serving  # noqa: F401, PLC0415  # takes seconds, which importers of this module must not pay

    assert len(os.listdir("/proc/self/task")) == 1, "a second thread, which a fork would lose"
    for module, flags in _forks(socket.socket(fileno=int(sys.argv[1]))):
        sys.argv = [module, *flags]
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if not isinstance(end.code, int):
                raise
            _end(end.code)
        _end(0)
    os._exit(0)  # here, too, without tearing down the modules


if __name__ == "__main__":
    main()
