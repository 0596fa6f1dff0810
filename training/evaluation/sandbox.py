"""Runs programs that a model wrote, each in a process of its own with limits, and says which came to their end.

What holds on every Linux: time by the clock and of the CPU, memory, the size of a file; no further process or thread; an empty
environment, an empty folder to work in, no input, no output; nothing of it is left afterwards. Where the system permits
namespaces to whoever runs this (most do, containers often do not) there is also no network, no other process to be seen or
signalled, and no file that can be changed.

It protects from mistakes, not from an attacker: a program reads the files that its user may read, may change them where
namespaces are not permitted, and shares the kernel. What sets out to find the secret that proves its success can find it. For
programs of a model that you do not trust, run all of it in a virtual machine.
"""

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from tqdm import tqdm

from lori.errors import LoriError

ISOLATED = Path(__file__).with_name("isolated.py")
PYTHON = Path(sys.executable).resolve()
"""Not the virtual environment's: a program has the standard library alone."""
SPARE_S = 10.0
"""For Python to start, and to end."""


class SandboxError(LoriError):
    """Programs cannot be run within limits on this system."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may take."""

    seconds: float = 30.0
    """By the clock."""
    cpu_s: int = 10
    """Of the CPU: it does not depend on what else the machine does."""
    memory_bytes: int = 2**30
    """Of address space."""


DEFAULT_LIMITS = Limits()


def runs_to_end(program: str, limits: Limits) -> bool:
    """Run `program`; says whether its last line was reached: not where it raised, exited before, or met a limit."""
    secret, text = secrets.token_bytes(32), program.encode()
    with TemporaryFile() as given, TemporaryFile() as told, TemporaryDirectory() as folder:
        given.write(text + secret)
        given.flush()
        arguments = map(str, (ISOLATED, len(text), limits.seconds, limits.cpu_s, limits.memory_bytes))
        process = subprocess.Popen(
            [PYTHON, "-I", "-S", *arguments],
            stdin=given,
            stdout=told,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        _await_end(process, limits.seconds)
        told.seek(0)
        return told.read(len(secret) + 1) == secret


def _await_end(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    """Wait for the end of `process`, which kills its program after `seconds`; where it does not, its whole session is killed."""
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds + SPARE_S)
    finally:
        # Its number is no other's as long as it was not waited for.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_all(programs: Sequence[str], limits: Limits) -> list[bool]:
    """Run `programs`, as many together as there are CPUs, and says of each whether it came to its end.

    Raises `SandboxError` where nothing can be run within such limits.
    """
    if not runs_to_end("", limits):
        raise SandboxError("no program can be run within limits: it takes Linux, and for root the permission to make namespaces")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = pool.map(lambda program: runs_to_end(program, limits), programs)
        return list(tqdm(runs, total=len(programs), desc="programs", unit="program", disable=None))
