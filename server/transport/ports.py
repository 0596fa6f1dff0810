"""Ports of this machine: whether one can be listened on, and which nobody listens on."""

import socket


def check_port(host: str, port: int) -> None:
    """Raises `OSError` where nothing can listen there: loading takes seconds, and a port that is taken is better said before."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def free_port() -> int:
    """Returns a port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
