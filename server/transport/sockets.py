"""Sockets: free ports, the limit on open files and connections, and a shutdown that resets no connection.

Closing a listening socket resets every connection that was made and not accepted, with its requests. So the kernel is first told
to drop the first packet of new connections: their clients try again a second later, when the socket is closed. Only Linux can do
that; elsewhere a connection of that very moment may be reset.
"""

import contextlib
import ctypes
import errno
import logging
import random
import socket
import struct
import sys

logger = logging.getLogger(__name__)


PORTS = range(20_000, 32_768)
"""Ports that neither Linux gives to connections (net.ipv4.ip_local_port_range) nor Ray to its workers."""
FIRST_USER_PORT = 1024
"""The first port that is not reserved for the system, on most systems."""


class ListenError(Exception):
    """Nothing can listen at this address. The message has the reason and the flag that helps."""

    def __init__(self, host: str, port: int, error: OSError) -> None:
        """`error` is the error of the system, or of the lookup of the host's name."""
        remedy = "pass another --port"
        if error.errno in (errno.EACCES, errno.EPERM) and port < FIRST_USER_PORT:
            remedy = f"ports below {FIRST_USER_PORT} are the system's: pass a higher --port, such as --port 8000"
        elif error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
            remedy = "pass a --host that is an address of this machine, such as 127.0.0.1"
        super().__init__(f"cannot listen on {host}:{port}: {error.strerror}; {remedy}")


def check_port(host: str, port: int) -> None:
    """Raise `OSError` if nothing can listen there. Loading takes seconds, so a port that is taken is reported before."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def free_port() -> int:
    """Return a port that nothing listens on, and that no connection will get meanwhile. Raises `OSError` if there is none."""
    for port in random.sample(PORTS, len(PORTS)):
        try:
            check_port("", port)
        except OSError:
            continue
        return port
    raise OSError(f"something listens on all ports from {PORTS[0]} to {PORTS[-1]}")


if sys.platform != "win32":
    import resource


RESERVE = 256
"""Descriptors for files, models and refused connections. With fewer than twice as many, half of them."""


def connection_room(num_wanted: int) -> int:
    """Return the number of connections that are possible: `num_wanted`, or fewer if there are too few descriptors (logged)."""
    if sys.platform == "win32":
        return num_wanted
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = num_wanted if soft == resource.RLIM_INFINITY else max(soft - RESERVE, soft // 2)
    if room < num_wanted:
        logger.warning("--max-connections is %d, of which %d files open at once leave room for %d", num_wanted, soft, room)
    return min(num_wanted, room)


def raise_descriptor_limit() -> None:
    """Raise the soft limit to the hard one. The common 1024 is less than the idle connections of many clients."""
    if sys.platform == "win32":  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ValueError, OSError) as error:  # macOS calls the hard limit unlimited, but does not accept that value
        logger.warning("at most %d files and connections may be open at once; more could not be had: %s", soft, error)


SO_ATTACH_FILTER = 26
PROGRAM = (
    (0x30, 0, 0, 13),  # load the byte of the TCP header that holds the flags
    (0x45, 0, 1, 0x02),  # is it a SYN?
    (0x06, 0, 0, 0),  # then drop it
    (0x06, 0, 0, 0xFFFFFFFF),  # else take all of it
)
"""Classic BPF, as in Linux's Documentation/networking/filter.rst: code, jump if true, jump if false, operand."""


def refuse_connections(listening: socket.socket) -> None:
    """Accept no new connections. Those whose handshake has begun are still made."""
    if sys.platform != "linux":
        return
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in PROGRAM)
    buffer = ctypes.create_string_buffer(code, len(code))
    with contextlib.suppress(OSError):  # a kernel without filters: a rare reset is better than no shutdown
        listening.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(PROGRAM), ctypes.addressof(buffer)))
