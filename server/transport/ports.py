"""Ports of this machine: whether one can be listened on, and which nobody listens on."""

import errno
import random
import socket

OWN = range(20_000, 32_768)
"""Ports that neither Linux gives to connections (net.ipv4.ip_local_port_range) nor Ray to its workers."""
FIRST_FREE = 1024
"""Ports below it are the system's, on most."""


class ListenError(Exception):
    """Nothing can listen at this address: says why, and which flag helps."""

    def __init__(self, host: str, port: int, error: OSError) -> None:
        """`error` is what the system, or the lookup of the host's name, said."""
        remedy = "pass another --port"
        if error.errno in (errno.EACCES, errno.EPERM) and port < FIRST_FREE:
            remedy = f"ports below {FIRST_FREE} are the system's: pass a higher --port, such as --port 8000"
        elif error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
            remedy = "pass a --host that is an address of this machine, such as 127.0.0.1"
        super().__init__(f"cannot listen on {host}:{port}: {error.strerror}; {remedy}")


def check_port(host: str, port: int) -> None:
    """Raises `OSError` where nothing can listen there: loading takes seconds, and a port that is taken is better said before."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def free_port() -> int:
    """Returns a port that nothing listens on now, and no connection will have meanwhile. Raises `OSError` where there is none."""
    for port in random.sample(OWN, len(OWN)):
        try:
            check_port("", port)
        except OSError:
            continue
        return port
    raise OSError(f"something listens on all ports from {OWN[0]} to {OWN[-1]}")
