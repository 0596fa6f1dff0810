"""Whether a port can be listened on: loading takes seconds, and a port that is taken is better said before."""

import socket


def check_port(host: str, port: int) -> None:
    """Raises `OSError` where nothing can listen there."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
