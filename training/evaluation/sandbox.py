"""A sandbox for programs that a model wrote: each runs in a process of its own, with limits. The result is whether it completed.

On every Linux there are limits on wall-clock time, CPU time, memory and file size. A program can start no other process or
thread. It has an empty environment, an empty working folder, no input and no output, and leaves nothing behind. If the system
lets this user create namespaces (most systems do, containers often do not), a program also has no network, cannot see or signal
other processes, and cannot change any file.

The sandbox protects from mistakes, not from attackers. A program can read the files that its user can read, can change them if
namespaces are not permitted, and shares the kernel. A program that searches for the secret that proves its completion can find
it. For a model that you do not trust, run everything in a virtual machine.
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
"""The Python outside of any virtual environment, so that a program has the standard library alone."""
SPARE_S = 10.0
"""Additional seconds for Python to start and to exit."""


class SandboxError(LoriError):
    """The system cannot run programs within limits."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Resource limits of one program."""

    seconds: float = 30.0
    """Wall-clock time."""
    cpu_s: int = 10
    """CPU time in seconds, which does not depend on the load of the machine."""
    memory_bytes: int = 2**30
    """Address space."""


DEFAULT_LIMITS = Limits()


def run_sandboxed(program: str, limits: Limits) -> bool:
    """Run `program` and return whether it completed. It did not if it raised, exited early, or met a limit."""
    secret, text = secrets.token_bytes(32), program.encode()
    with TemporaryFile() as program_file, TemporaryFile() as output_file, TemporaryDirectory() as folder:
        program_file.write(text + secret)
        program_file.flush()
        arguments = map(str, (ISOLATED, len(text), limits.seconds, limits.cpu_s, limits.memory_bytes))
        process = subprocess.Popen(
            [PYTHON, "-I", "-S", *arguments],
            stdin=program_file,
            stdout=output_file,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        _wait_or_kill(process, limits.seconds)
        output_file.seek(0)
        return output_file.read(len(secret) + 1) == secret


def _wait_or_kill(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    """Wait for `process`, which kills its program after `seconds`. If it does not end in time, kill its whole session."""
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds + SPARE_S)
    finally:
        # The kernel cannot reuse the process id before the process is waited for.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_programs(programs: Sequence[str], limits: Limits) -> list[bool]:
    """Run `programs`, one on each CPU at a time, and return whether each completed.

    Raises `SandboxError` if the system cannot run programs within `limits`.
    """
    if not run_sandboxed("", limits):
        raise SandboxError("no program can be run within limits: it takes Linux, and for root the permission to make namespaces")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = pool.map(lambda program: run_sandboxed(program, limits), programs)
        return list(tqdm(runs, total=len(programs), desc="programs", unit="program", disable=None))
