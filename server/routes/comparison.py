"""GET /adapters/compare: how adapters relate, before a merge. Only translates."""

from collections.abc import Sequence
from typing import Annotated

import anyio
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from lori.errors import AdapterError
from server.access.limits import TenantPlaces
from server.catalog.comparison import Comparer
from server.engine.adapters.registry import Registered
from server.engine.generate_request import RefusedError
from server.engine.weight_resolver import WeightResolver
from server.errors import AdapterFailedError, BusyError
from server.routes.dependencies import CallerOf, ServiceOf, check_query
from server.routes.references import find
from server.schemas.adapters import AdapterComparison

MAX_NAMES = 16
MAX_WAITING = 8
"""Comparisons of one tenant that wait, besides one that runs or is next."""
router = APIRouter()
Names = Annotated[
    str,
    Query(
        description=f"Adapters, each a name or `name@version`, with commas between: 1 to {MAX_NAMES}, each once.",
        examples=["math,safety"],
        json_schema_extra={"pattern": f"^[^,]+(,[^,]+){{0,{MAX_NAMES - 1}}}$"},
    ),
]


@router.get("/adapters/compare", response_model=AdapterComparison, dependencies=[Depends(check_query)])
async def compare(http: Request, service: ServiceOf, caller: CallerOf, names: Names) -> AdapterComparison | Response:
    """Compare up to 16 adapters, `names=math,safety`, each with each: their deltas, and their weights on each other's prompts.

    One comparison runs at a time, beside the requests.
    """
    references = split(names)
    comparer, lock, places = http.state.comparer, http.state.comparing, http.state.comparisons
    assert isinstance(comparer, Comparer)
    assert isinstance(lock, anyio.Lock)
    assert isinstance(places, TenantPlaces)
    with service.limiter.places(caller):
        adapters = await find(service, caller, references, "names")
        if places.num_held(caller.tenant) > MAX_WAITING:
            raise BusyError(f"{MAX_WAITING} comparisons wait already, which is the limit; try again")
        with places.place(caller.tenant):
            async with lock:
                if await http.is_disconnected():
                    return Response(status_code=499)
                return await run_in_threadpool(answer, comparer, service.admission.weights, references, adapters)


def split(text: str) -> list[str]:
    """Return the names in a query. Raises `RefusedError` for too many names, none, or a duplicate."""
    names = text.split(",") if text else []
    if not 1 <= len(names) <= MAX_NAMES:
        raise RefusedError("names", f"has {len(names)} names, expected 1 to {MAX_NAMES}, with commas between")
    for place, name in enumerate(names):
        if name in names[:place]:
            raise RefusedError("names", f"has {name!r} twice, expected each once")
    return names


def answer(
    comparer: Comparer, resolver: WeightResolver, names: Sequence[str], adapters: Sequence[Registered]
) -> AdapterComparison:
    """Return the reply. Raises `AdapterFailedError` if an adapter cannot be read."""
    try:
        table = comparer.compare(adapters)
    except AdapterError as error:
        raise AdapterFailedError(str(error)) from error
    statistics = [resolver.statistics_of(adapter.summary) for adapter in adapters]
    return AdapterComparison(
        names=list(names),
        cosine=[[pair.cosine for pair in row] for row in table],
        overlap=[[pair.overlap for pair in row] for row in table],
        sign_conflict=[[pair.sign_conflict for pair in row] for row in table],
        chance_overlap=[[pair.chance_overlap for pair in row] for row in table],
        auto_weight=comparer.auto_weights(resolver.background, statistics),
    )
