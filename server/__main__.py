"""`python -m server`: serves the embedded model and the demo adapters, or what its flags say."""

import signal
import sys
from types import FrameType

from lori.errors import AdapterFormatError, LoriError
from lori.printable import printable_lines
from server.access.exposure import ExposedError, check_exposure, log_exposure
from server.access.keys import KeyFileError
from server.app import create_app
from server.arguments import read_arguments
from server.loading import load_service
from server.settings import Settings
from server.telemetry.logs import configure_log
from server.telemetry.tracing import start_tracing
from server.transport.descriptors import raise_descriptor_limit
from server.transport.drain import DrainingServer
from server.transport.http_config import http_config
from server.transport.ports import ListenError, check_port


def main() -> int:
    """Runs the server until SIGTERM or SIGINT; running requests may end first. Returns the exit code.

    It also ends, with exit code 1, where the engine dies.
    """
    configure_log("text")
    raise_descriptor_limit()
    # While the server loads; afterwards it drains.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    try:
        settings = read_arguments(Settings)
        configure_log(settings.log_format)
        _check_address(settings)
        tracing = start_tracing(settings.otlp_traces_endpoint)
        service = load_service(settings)
    except ExposedError as error:
        print(printable_lines(f"error: {error}"), file=sys.stderr)
        return 2
    except (AdapterFormatError, KeyFileError) as error:
        print("error: " + "\n".join(error.lines), file=sys.stderr)
        return 1
    except (LoriError, ListenError, OSError) as error:
        print(printable_lines(f"error: {error}"), file=sys.stderr)
        return 1
    app = create_app(service)
    if tracing:
        tracing.instrument(app)
    log_exposure(settings)
    server = DrainingServer(http_config(app, settings), service)
    server.run()
    if tracing:
        tracing.stop()
    return 1 if server.has_failed else 0


def _check_address(settings: Settings) -> None:
    try:
        check_exposure(settings)
        check_port(settings.host, settings.port)
    except OSError as error:
        raise ListenError(settings.host, settings.port, error) from error


def _end(_: int, __: FrameType | None) -> None:
    sys.exit(0)


if __name__ == "__main__":
    sys.exit(main())
