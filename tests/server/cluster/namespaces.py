"""Machines that tests can cut off: Linux network namespaces, joined by a virtual cable. They need root."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

CABLE = "cable0"
NEW_NETWORK = 0x40000000
"""CLONE_NEWNET of <sched.h>; `os.setns` came with Python 3.12."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A namespace with an address."""

    name: str
    address: str

    @property
    def within(self) -> Sequence[str]:
        """Return the prefix of a command that runs in the machine."""
        return ("ip", "netns", "exec", self.name)

    def threads(self, number: int) -> ThreadPoolExecutor:
        """Return threads of this process that see the machine's network, and no other."""
        return ThreadPoolExecutor(number, initializer=self._enter)

    def plug(self, state: str) -> None:
        """Unplug the machine's cable (`down`), or plug it in again (`up`)."""
        _ip("-n", self.name, "link", "set", CABLE, state)

    def kill(self) -> None:
        """Kill all processes that run in the machine."""
        for number in _ip("netns", "pids", self.name).split():
            try:
                os.kill(int(number), 9)
            except ProcessLookupError:
                continue

    def _enter(self) -> None:
        with Path("/run/netns", self.name).open() as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), NEW_NETWORK):
                raise OSError(ctypes.get_errno(), f"cannot enter {self.name}")


def why_not() -> str | None:
    """Return the reason why there can be no such machines here, or None."""
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    if shutil.which("ip") is None:
        return "there is no `ip` (apt install iproute2)"
    try:
        with two_machines("probe"):
            return None
    except subprocess.CalledProcessError as error:
        return f"there can be no network namespaces: {error.stderr.strip()}"


@contextmanager
def two_machines(name: str) -> Iterator[tuple[Machine, Machine]]:
    """Yield two machines that reach only each other. Removes them and their processes when the block ends."""
    machines = [Machine(f"lori-{name}-{os.getpid()}-{number}", f"10.77.0.{number}") for number in (1, 2)]
    first, second = machines
    with ExitStack() as stack:
        for machine in machines:
            _ip("netns", "add", machine.name)
            stack.callback(_ip, "netns", "del", machine.name)
            stack.callback(machine.kill)
        _ip("-n", first.name, "link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", second.name)
        for machine in machines:
            _ip("-n", machine.name, "address", "add", f"{machine.address}/24", "dev", CABLE)
            _ip("-n", machine.name, "link", "set", "lo", "up")
            machine.plug("up")
        yield first, second


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
