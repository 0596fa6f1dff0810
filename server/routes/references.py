"""Adapters that a path, a query or `model` names, found for its caller beside the event loop."""

from collections.abc import Sequence

from starlette.concurrency import run_in_threadpool

from lori.errors import UnknownAdapterError
from server.access.caller import Caller
from server.engine.adapters.registry import Registered
from server.engine.adapters.resolution import AmbiguousVersionError, FaultyAdapterError, resolve
from server.errors import FieldError
from server.service import Service


async def find(service: Service, caller: Caller, references: Sequence[str], field: str) -> list[Registered]:
    """Returns what references mean, each a name or `name@version`. Raises `FieldError` where they are not of one adapter each."""
    try:
        return await run_in_threadpool(lambda: [resolve(service.registry, of, caller.may_use) for of in references])
    except (UnknownAdapterError, FaultyAdapterError, AmbiguousVersionError) as error:
        raise FieldError(field, error) from error
