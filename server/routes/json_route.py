"""Routes with strict JSON bodies, and long JSON replies that are made off the event loop.

FastAPI alone would accept ambiguous JSON, and JSON that takes seconds to parse.
"""

from collections.abc import Callable, Coroutine
from time import perf_counter
from typing import Any

from anyio import sleep
from anyio.to_thread import run_sync
from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from server.access.gate import client_of
from server.errors import BodyError
from server.service.service import Service
from server.transport.bodies import HELD_KEY, PARSED_BYTES, HeldBody
from server.transport.strict_json import MAX_VALUES, JsonError, read_json


async def json_reply(make: Callable[[], BaseModel]) -> Response:
    """Return the result of `make` as JSON. Runs in a thread, and raises what `make` raises."""
    return Response(await run_sync(lambda: make().model_dump_json()), media_type="application/json")


SHORT_BODY = 64 * 1024
"""Bytes of a body that is parsed at once. Longer bodies are parsed one at a time, with a rest after each: otherwise other
requests' streams would wait for all that arrive together."""
REST = 3.0
"""After a long body the parser rests for at least this many times the parse time, so it is busy a quarter of the time at most."""
BYTES_PER_S = 32 * 1024 * 1024
"""Maximum number of bytes of long bodies that are parsed in a second: receiving and checking them costs several times the
parse."""


class JsonRequest(Request):
    """A request whose body is strict JSON, with no list longer than a prompt can be."""

    async def json(self) -> Any:
        """Return the body's value, or refuse it."""
        service, body = self.state.service, await self.body()
        assert isinstance(service, Service)
        if len(body) <= SHORT_BODY:
            return _read(body, service)
        async with service.parse_semaphores.acquire(client_of(self.scope)), service.parse_lock:
            self._reserve(body)
            began = perf_counter()
            try:
                return _read(body, service)
            finally:
                await sleep(max(REST * (perf_counter() - began), len(body) / BYTES_PER_S))

    def _reserve(self, body: bytes) -> None:
        held = self.scope["state"].get(HELD_KEY)
        if isinstance(held, HeldBody) and (no_room := held.grow(PARSED_BYTES * min(body.count(b","), MAX_VALUES))):
            raise HTTPException(no_room.status, no_room.message, no_room.headers)


def _read(body: bytes, service: Service) -> Any:
    try:
        return read_json(body, service.admission.max_context)
    except JsonError as error:
        raise BodyError(str(error), error.field) from error


class JsonRoute(APIRoute):
    """A route of JSON requests."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler of a request."""
        handle = super().get_route_handler()

        async def read(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return read
