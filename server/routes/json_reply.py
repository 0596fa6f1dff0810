"""A reply that may be long, made and written beside the event loop."""

from collections.abc import Callable

from anyio.to_thread import run_sync
from fastapi.responses import Response
from pydantic import BaseModel


async def json_reply(make: Callable[[], BaseModel]) -> Response:
    """Returns what `make` returns, in JSON. Raises what `make` raises."""
    return Response(await run_sync(lambda: make().model_dump_json()), media_type="application/json")
