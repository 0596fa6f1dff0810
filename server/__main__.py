"""`python -m server`: serves the embedded model and the demo adapters, or what its flags say."""

import logging
import signal
import socket
import sys
import threading
from types import FrameType

import uvicorn
from pydantic import ValidationError

from lori.errors import AdapterFormatError, LoriError
from lori.flags import flag_faults
from server.access.exposure import ExposedError, check_exposure, log_exposure
from server.access.keys import KeyFileError
from server.app import create_app
from server.engine.thread import EngineThread
from server.loading import load_service
from server.settings import Settings

DRAIN_S = 30
GRACE_S = 5


def main() -> int:
    """Runs the server until SIGTERM or SIGINT; running requests may end first. Returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    # uvicorn drains on these signals, then raises them again for whoever had them before: for us that is a clean end.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    try:
        settings = Settings(_cli_parse_args=True)
        check_exposure(settings)
        _check_port(settings.host, settings.port)
        service = load_service(settings)
    except ValidationError as error:
        print(f"error: {flag_faults(error)}", file=sys.stderr)
        return 2
    except ExposedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot listen on {settings.host}:{settings.port}: {error.strerror}; pass another --port", file=sys.stderr)
        return 1
    except (AdapterFormatError, KeyFileError) as error:
        print("error: " + "\n".join(error.lines), file=sys.stderr)
        return 1
    except LoriError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    log_exposure(settings)
    config = uvicorn.Config(
        create_app(service), host=settings.host, port=settings.port, timeout_graceful_shutdown=DRAIN_S + GRACE_S
    )
    DrainingServer(config, service.engine, settings.max_unread_s).run()
    return 0


class DrainingServer(uvicorn.Server):
    """Stops the engine when running requests have had their time, so that each hears an error before its connection ends.

    A connection whose client takes nothing of what was sent for `max_unread_s` is ended by the system, where it can (Linux):
    closing it would wait until all is taken.
    """

    def __init__(self, config: uvicorn.Config, engine: EngineThread, max_unread_s: float) -> None:
        super().__init__(config)
        self._engine, self._max_unread_s = engine, max_unread_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens; what is accepted has the options of the socket that listens."""
        await super().startup(sockets)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            for listening in (of for server in self.servers for of in server.sockets):
                listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * self._max_unread_s))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stops accepting, waits for running requests, and ends what is left."""
        timer = threading.Timer(DRAIN_S, self._engine.request_stop)
        timer.start()
        await super().shutdown(sockets)
        timer.cancel()


def _check_port(host: str, port: int) -> None:
    # Loading takes seconds; a port that is taken is better said before.
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))


def _end(_: int, __: FrameType | None) -> None:
    sys.exit(0)


if __name__ == "__main__":
    sys.exit(main())
