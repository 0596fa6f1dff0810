"""Runs one Python program in this process, shut off as far as the system lets it. `training.evaluation.sandbox` starts it.

A script of its own, of the standard library alone: `python -I -S isolated.py SIZE SECONDS CPU_S MEMORY_BYTES`. Standard input
is a file: a program of SIZE bytes, then a secret, which is read and written to standard output only once the program has come to
its end.
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
"""Of linux/prctl.h."""
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
"""Of linux/mount.h; the system call has this number on every architecture."""
READ_ONLY = (ctypes.c_uint64 * 4)(1, 0, 0, 0)
"""struct mount_attr: MOUNT_ATTR_RDONLY is set, nothing is cleared."""


def shut_off() -> None:
    """Take the network, other processes and writable files away, where the system permits it."""
    system = ctypes.CDLL(None)
    if os.geteuid() == 0:
        # The number of root's processes is never limited; whose they are is said by the real user.
        os.setresuid(NOBODY, 0, 0)
    if system.unshare(NEW_NAMESPACES) == 0:
        system.syscall(MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, READ_ONLY, ctypes.sizeof(READ_ONLY))
    system.prctl(SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)


def limit(cpu_s: int, memory_bytes: int) -> None:
    """Bound what this process can take; it can start no other. Raises `OSError` where it still can."""
    limits = {
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: MAX_FILE_BYTES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))
    # It is tried, since who is exempt differs from system to system.
    with suppress(BlockingIOError):
        if os.fork():
            raise OSError("processes can be started in spite of RLIMIT_NPROC")
        os._exit(0)


def end_with_parent() -> None:
    """From here on this process is killed when the one that started it ends."""
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def await_end(child: int, seconds: float) -> None:
    """Wait for `child`, and kills it after `seconds`. What it may have started in its process namespace goes, too."""
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    os.waitpid(child, 0)


def run(size: int, seconds: float, cpu_s: int, memory_bytes: int) -> None:
    """Run the program and, if it comes to its end, tells the secret. Never returns."""
    program, secret_from, told = os.pread(0, size, 0), os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    shut_off()
    end_with_parent()
    if child := os.fork():  # a process is in its new process namespace only from its birth on
        await_end(child, seconds)
        os._exit(0)
    end_with_parent()
    limit(cpu_s, memory_bytes)
    exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    os.write(told, os.pread(secret_from, 1024, size))
    os._exit(0)


if __name__ == "__main__":
    run(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
