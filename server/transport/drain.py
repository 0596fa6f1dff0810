"""How the server ends, so that no request is lost that was sent to it.

SIGTERM turns /ready off. For a notice, connections are taken as before, and every answer says that its connection ends: who sends
requests goes elsewhere. Then new connections are refused, those that were made are answered, and those that send nothing more are
closed. What still runs after its time hears an error.

A server whose engine has died ends by itself, without that time: nothing runs any more, and /health says so until it ends.
"""

import logging
import os
import signal
import socket
from types import FrameType

import anyio
import uvicorn

from server.engine.thread import end_process_after
from server.service import Service
from server.transport.connections import BoundedState, Waiting, is_readable
from server.transport.sockets import connection_room, refuse_connections

logger = logging.getLogger(__name__)
GRACE_S = 5
"""For what is left to hear its error."""
LAST_CALL_S = 1.0
"""How long a connection must have been silent before it is closed: a request may be on its way."""
BACKLOG_S = 0.1
"""For handshakes that were begun; longer where connections still wait to be taken."""
TICK_S = 0.05
FAILED_NOTICE_S = 2.0
"""How long a server whose engine has died still answers: long enough for a probe a second."""
LAST_RESORT_S = 10.0
"""How long its end may take; then the process ends as it is. An end that is not stuck takes 8 s at most."""


class DrainingServer(uvicorn.Server):
    """Serves until SIGTERM or SIGINT, then lets requests end; at the second signal it ends at once.

    SIGINT comes from a person: there is no notice. A connection whose client takes nothing of what was sent for `max_unread_s` is
    ended by the system, where it can (Linux): closing it would wait until all is taken.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service, self._settings = service, service.settings
        self._waiting = Waiting(self)
        self.server_state = BoundedState(connection_room(self._settings.max_connections), self._waiting)
        self._has_notice, self._has_signal = True, False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, and says so in the last line of the start; what is accepted has the options of the socket that listens."""
        await super().startup(sockets)
        if not self.started:
            return
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            for listening in self._listening():
                listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * self._settings.max_unread_s))
        logger.info("ready on %s: %s", self._url(), self._service.outline)

    async def on_tick(self, counter: int) -> bool:
        """Close, about once a second, connections that send no request; returns whether to end."""
        self.should_exit = self.should_exit or self.has_failed
        if counter % 10 == 0:
            self._waiting.look()
            self._waiting.close(self._settings.keep_alive_s)
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002  # uvicorn's signature
        """Begin to end, or ends."""
        if self._has_signal:
            logger.warning("ended at once by a second signal")
            os._exit(1)
        self._has_signal = True
        self._has_notice = sig != signal.SIGINT
        self._service.is_draining = self.should_exit = True

    @property
    def has_failed(self) -> bool:
        """Whether the engine, or a task beside the requests such as the key file's, has died: the server ends, and not well."""
        return self._service.engine.has_died or self.lifespan.error_occurred

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End as the module says."""
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
        await self._watch(FAILED_NOTICE_S, LAST_CALL_S)
        await self._stop_listening()

    async def _drain(self) -> None:
        if self._has_notice:
            logger.info("not ready any more; connections are taken for %g s yet", self._settings.drain_notice_s)
            await self._watch(self._settings.drain_notice_s, self._settings.keep_alive_s)
        await self._stop_listening()
        logger.info("no connection is taken any more; requests have %g s", self._settings.drain_s)
        await self._watch(self._settings.drain_s, LAST_CALL_S, until_none=True)

    async def _watch(self, seconds: float, max_waiting_s: float, *, until_none: bool = False) -> None:
        # Meanwhile closes connections that wait for a request too long.
        end = anyio.current_time() + seconds
        while (left := end - anyio.current_time()) > 0 and not (until_none and self._is_idle()):
            self._waiting.look()
            self._waiting.close(max_waiting_s)
            await anyio.sleep(min(TICK_S, left))

    def _is_idle(self) -> bool:
        return not (self.server_state.connections or self.server_state.tasks)

    async def _stop_listening(self) -> None:
        # Closing resets connections that nobody has taken yet, so first no more may come.
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
        return [of for server in self.servers for of in server.sockets]
