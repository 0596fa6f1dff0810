"""Routes that read their bodies as strict JSON. FastAPI would take what is ambiguous, and what takes seconds to read."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from server.errors import BodyError
from server.service import Service
from server.transport.strict_json import JsonError, read_json


class JsonRequest(Request):
    """A request whose body is strict JSON, with no list longer than a prompt can be."""

    async def json(self) -> Any:
        """Returns the body's value, or refuses it."""
        service = self.state.service
        assert isinstance(service, Service)
        try:
            return read_json(await self.body(), service.admission.max_context)
        except JsonError as error:
            raise BodyError(str(error), error.field) from error


class JsonRoute(APIRoute):
    """A route of such requests."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Returns what answers a request."""
        handle = super().get_route_handler()

        async def read(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return read
