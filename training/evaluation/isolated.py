"""Script that runs one Python program, isolated as far as the system permits. `training.evaluation.sandbox` starts it.

Usage: `python -I -S isolated.py SIZE SECONDS CPU_S MEMORY_BYTES`. It uses the standard library alone. Standard input is a file: a
program of SIZE bytes, then a secret. The secret is proof that the program ran to its end: only then is it read and written to
standard output. A program that raises, exits early or meets a limit leaves standard output empty.
"""

import ctypes
import os
import resource
import signal
import sys
from contextlib import suppress

NOBODY = 65534
MAX_FILE_BYTES = 2**20
NEW_NAMESPACES = 0x10000000 | 0x40000000 | 0x20000000 | 0x08000000 | 0x00020000
"""CLONE_NEWUSER, NEWNET, NEWPID, NEWIPC, NEWNS of linux/sched.h."""
SET_PARENT_DEATH_SIGNAL, SET_NO_NEW_PRIVILEGES = 1, 38
"""Constants of linux/prctl.h."""
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
"""Constants of linux/mount.h. The system call has this number on every architecture."""
READ_ONLY = (ctypes.c_uint64 * 4)(1, 0, 0, 0)
"""struct mount_attr: MOUNT_ATTR_RDONLY is set, nothing is cleared."""


def isolate() -> None:
    """Remove access to the network, other processes and writable files, as far as the system permits."""
    system = ctypes.CDLL(None)
    if os.geteuid() == 0:
        # RLIMIT_NPROC does not limit root, and counts processes by the real user.
        os.setresuid(NOBODY, 0, 0)
    if system.unshare(NEW_NAMESPACES) == 0:
        system.syscall(MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, READ_ONLY, ctypes.sizeof(READ_ONLY))
    system.prctl(SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)


def set_limits(cpu_s: int, memory_bytes: int) -> None:
    """Limit the resources of this process, and forbid it to start others. Raises `OSError` if it can still start one."""
    limits = {
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: MAX_FILE_BYTES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))
    # Test RLIMIT_NPROC, since the users that are exempt from it differ between systems.
    with suppress(BlockingIOError):
        if os.fork():
            raise OSError("processes can be started in spite of RLIMIT_NPROC")
        os._exit(0)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def wait_or_kill(child: int, seconds: float) -> None:
    """Wait for `child`, and kill it after `seconds`. Its death also ends all other processes of its process namespace."""
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    os.waitpid(child, 0)


def run(size: int, seconds: float, cpu_s: int, memory_bytes: int) -> None:
    """Run the program. If it completes, write the secret to standard output. Never returns."""
    program, input_file, output_file = os.pread(0, size, 0), os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    isolate()
    die_with_parent()
    if child := os.fork():  # only processes that are started after unshare() are in the new process namespace
        wait_or_kill(child, seconds)
        os._exit(0)
    die_with_parent()
    set_limits(cpu_s, memory_bytes)
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    os.write(output_file, os.pread(input_file, 1024, size))
    os._exit(0)


if __name__ == "__main__":
    run(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
