"""The program `python -m server`: reads its flags, logs that it starts, and only then imports torch, which takes seconds."""

import logging
import signal
import sys
from types import FrameType

from lori.errors import AdapterFormatError, LoriError
from lori.flags import PACKAGE, package_version
from lori.printable import printable_lines
from server.access.exposure import ExposedError
from server.access.keys import KeyFileError
from server.arguments import GROUPS, read_arguments
from server.settings import Settings
from server.start_checks import check_start
from server.telemetry.logs import configure_log, configure_start
from server.telemetry.tracing import start_tracing
from server.transport.sockets import ListenError, raise_descriptor_limit

logger = logging.getLogger(__name__)


def run() -> int:
    """Run the server until SIGTERM or SIGINT, after which running requests may end. Return the exit code.

    The server also ends, with exit code 1, if the engine dies.
    """
    configure_log("text")
    signal.signal(signal.SIGTERM, _exit)  # while the server loads; later it drains
    settings = read_arguments(Settings, GROUPS)
    configure_start(settings.log_format)
    try:
        return _serve(settings)
    except ExposedError as error:
        print(printable_lines(f"error: {error}"), file=sys.stderr)
        return 2
    except (AdapterFormatError, KeyFileError) as error:
        print("error: " + "\n".join(error.lines), file=sys.stderr)
        return 1
    except (LoriError, ListenError, OSError) as error:
        print(printable_lines(f"error: {error}"), file=sys.stderr)
        return 1


def _serve(settings: Settings) -> int:
    check_start(settings)
    tracing = start_tracing(settings.otlp_traces_endpoint)
    logger.info("%s %s starts: importing torch and transformers …", PACKAGE, package_version())
    raise_descriptor_limit()
    from server.serving import serve  # noqa: PLC0415  # takes seconds, so the server first logs that it starts

    return serve(settings, tracing)


def _exit(_: int, __: FrameType | None) -> None:
    sys.exit(0)
