"""The HTTP server: uvicorn with this project's configuration, and with a graceful shutdown that loses no request.

SIGTERM turns /ready off. During a notice, connections are accepted as before, and every answer closes its connection, so that
clients and load balancers go elsewhere. Then new connections are refused, requests on existing ones are answered, and idle ones
are closed. Requests that still run after the drain time get an error.

A server whose engine has died ends by itself, without the drain time: nothing runs any more, and /health says so until the end.
"""

import logging
import math
import os
import signal
import socket
from types import FrameType

import anyio
import uvicorn
from starlette.types import ASGIApp

from server.engine.thread import end_process_after
from server.service.service import Service
from server.settings import Settings
from server.transport.connections import BoundedState, IdleConnections, is_readable
from server.transport.http_protocol import HttpProtocol
from server.transport.sockets import connection_room, refuse_connections

logger = logging.getLogger(__name__)
GRACE_S = 5
"""Seconds for remaining requests to get their error."""
LAST_CALL_S = 1.0
"""Seconds that a connection must have been silent before it is closed: a request may be on its way."""
BACKLOG_S = 0.1
"""Seconds for handshakes that have begun; longer while connections still wait to be accepted."""
TICK_S = 0.05
FAILED_NOTICE_S = 2.0
"""Seconds that a server whose engine has died still answers: long enough for one probe a second."""
LAST_RESORT_S = 10.0
"""Seconds until a failed server's process is killed. A shutdown that is not stuck takes 8 s at most."""


def http_config(app: ASGIApp, settings: Settings) -> uvicorn.Config:
    """Return the configuration of a server that answers with `app` at the address of `settings`.

    Shared by `python -m server` and the tests, so that the tests run the real configuration.
    """
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=HttpProtocol,
        ws="none",  # a web socket request is answered like any other
        lifespan="on",  # otherwise uvicorn ignores a task that fails
        log_config=None,  # our log configuration also covers uvicorn's loggers
        access_log=False,
        timeout_keep_alive=math.ceil(settings.keep_alive_s),
        timeout_graceful_shutdown=GRACE_S,
    )


class DrainingServer(uvicorn.Server):
    """uvicorn server that drains at SIGTERM or SIGINT. The second signal ends it at once.

    SIGINT comes from a person, so there is no notice. A connection whose client reads nothing for `max_unread_s` is ended by the
    operating system, where supported (Linux): a normal close would wait until all is read.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service, self._settings = service, service.settings
        self._idle_connections = IdleConnections(self)
        self.server_state = BoundedState(connection_room(self._settings.max_connections), self._idle_connections)
        self._has_notice, self._has_signal = True, False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and log that the server is ready. Accepted connections inherit the options of the listening socket."""
        await super().startup(sockets)
        if not self.started:
            return
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            for listening in self._listening():
                listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * self._settings.max_unread_s))
        logger.info("ready on %s: %s", self._url(), self._service.outline)

    async def on_tick(self, counter: int) -> bool:
        """About once a second, close connections that send no request. Return whether to end."""
        self.should_exit = self.should_exit or self.has_failed
        if counter % 10 == 0:
            self._idle_connections.scan()
            self._idle_connections.close(self._settings.keep_alive_s)
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002  # uvicorn's signature
        """Begin the shutdown, or end at once."""
        if self._has_signal:
            logger.warning("ended at once by a second signal")
            os._exit(1)
        self._has_signal = True
        self._has_notice = sig != signal.SIGINT
        self._service.is_draining = self.should_exit = True

    @property
    def has_failed(self) -> bool:
        """Whether the engine, or a background task such as the watch of the key file, has died.

        The server then ends with an error.
        """
        return self._service.engine.has_died or self.lifespan.error_occurred

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Shut down as the module describes."""
        self._service.is_draining = True
        if self._service.engine.has_died:
            await self._give_up()
        else:
            await self._drain()
        if self.server_state.tasks:
            self._service.engine.request_stop()
        await super().shutdown(sockets)

    async def _give_up(self) -> None:
        logger.critical("the server cannot go on, and ends: it is to be started again")
        end_process_after(LAST_RESORT_S)
        await self._wait(FAILED_NOTICE_S, LAST_CALL_S)
        await self._stop_listening()

    async def _drain(self) -> None:
        if self._has_notice:
            logger.info("not ready any more; connections are taken for %g s yet", self._settings.drain_notice_s)
            await self._wait(self._settings.drain_notice_s, self._settings.keep_alive_s)
        await self._stop_listening()
        logger.info("no connection is taken any more; requests have %g s", self._settings.drain_s)
        await self._wait(self._settings.drain_s, LAST_CALL_S, until_none=True)

    async def _wait(self, seconds: float, max_waiting_s: float, *, until_none: bool = False) -> None:
        # Meanwhile closes connections that wait too long for a request.
        end = anyio.current_time() + seconds
        while (remaining_s := end - anyio.current_time()) > 0 and not (until_none and self._is_idle()):
            self._idle_connections.scan()
            self._idle_connections.close(max_waiting_s)
            await anyio.sleep(min(TICK_S, remaining_s))

    def _is_idle(self) -> bool:
        return not (self.server_state.connections or self.server_state.tasks)

    async def _stop_listening(self) -> None:
        # Closing a socket resets connections that are not accepted yet, so first no more may come.
        for listening in self._listening():
            refuse_connections(listening)
        end = anyio.current_time() + BACKLOG_S
        while (now := anyio.current_time()) < end or (now < end + GRACE_S and any(map(is_readable, self._listening()))):
            await anyio.sleep(BACKLOG_S / 10)
        for server in self.servers:
            server.close()

    def _url(self) -> str:
        host, port = self.config.host, self._listening()[0].getsockname()[1]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def _listening(self) -> list[socket.socket]:
        return [sock for server in self.servers for sock in server.sockets]
