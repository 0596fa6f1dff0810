"""What clients are told of adapters. In any thread: thousands take a while."""

import time
from collections.abc import Iterator
from itertools import islice

from pydantic import TypeAdapter
from pydantic_core import to_json

from lori.compare.statistics import ModuleStatistics, total
from server.access.caller import Caller
from server.catalog.files import Details
from server.engine.adapters.cache import Place
from server.engine.adapters.registry import Registered
from server.schemas.adapters import AdapterDetail, AdapterInfo, FaultyAdapter, ModuleInfo
from server.service import Service

NUM_AT_ONCE = 32
"""Rows that are written before other threads may go on: about half a millisecond."""
ROWS = TypeAdapter(list[AdapterInfo])
FAULTY = TypeAdapter(list[FaultyAdapter])
NOWHERE = Place()


def describe(service: Service, of: Registered, place: Place, *, is_use_told: bool) -> AdapterInfo:
    """Return what a client is told of an adapter in a list."""
    summary, use = of.summary, service.uses.of(of.summary.name, of.summary.digest)
    return AdapterInfo(
        name=summary.name,
        version=summary.version,
        rank=summary.rank,
        alpha=summary.alpha,
        sparsity=summary.sparsity,
        density=1 - summary.sparsity,
        templates=list(summary.templates),
        merge_weights=dict(summary.merge_weights),
        metrics=dict(summary.metrics),
        bytes_on_disk=summary.num_bytes,
        bytes_loaded=place.bytes_loaded,
        bytes_resident=place.bytes_resident,
        tier=place.tier,
        is_pinned=service.admin.pins.get(summary.name) == summary.digest,
        num_using=use.num_using if is_use_told else None,
        last_used=use.last_used if is_use_told else None,
        num_requests=use.num_requests if is_use_told else None,
    )


def describe_one(service: Service, of: Registered, *, is_use_told: bool = True) -> AdapterInfo:
    """The same, of a single one."""
    return describe(service, of, service.engine.places().get(of.summary.digest, NOWHERE), is_use_told=is_use_told)


def describe_whole(service: Service, of: Registered, details: Details, caller: Caller) -> AdapterDetail:
    """Return what a client is told of an adapter that it asks for."""
    registry, summary = service.registry, of.summary
    versions = [version.summary.version for version in registry.versions(summary.name)]
    others = (other for other in registry.find(summary.digest, ()) if other.entry.folder == of.entry.folder)
    aliases = {other.summary.name for other in others if registry.by_name.get(other.summary.name) == other} - {summary.name}
    return AdapterDetail(
        **describe_one(service, of, is_use_told=_is_use_told(service, caller)).model_dump(),
        versions=versions,
        aliases=sorted(filter(caller.may_use, aliases)),
        card=details.card,
        targets=list(summary.targets),
        basis=str(summary.basis),
        modules=list(map(_module, details.modules)),
        total=_module(total(details.modules)),
    )


def encode_list(service: Service, caller: Caller, prefix: str, after: str, limit: int | None) -> bytes:
    """Return the reply of GET /adapters as JSON: of names that may be used, those that begin with `prefix`, after `after`."""
    by_name, places = service.registry.by_name, service.engine.places()
    names = sorted(name for name in by_name if name.startswith(prefix) and name > after and caller.may_use(name))
    shown = names if limit is None else names[:limit]
    last = to_json(shown[-1] if len(shown) < len(names) else None)
    is_told = _is_use_told(service, caller)
    found = ((of, places.get(of.summary.digest, NOWHERE)) for of in map(by_name.__getitem__, shown))
    rows = (describe(service, of, place, is_use_told=is_told) for of, place in found)
    written = b",".join(_write(rows))
    end = shown[-1] if len(shown) < len(names) else ""
    faulty = FAULTY.dump_json(_faulty(service, caller, prefix, after, end))
    return b'{"base_model":%b,"adapters":[%b],"faulty":%b,"next":%b}' % (to_json(service.base_model), written, faulty, last)


def _faulty(service: Service, caller: Caller, prefix: str, after: str, end: str) -> list[FaultyAdapter]:
    found = sorted(service.registry.faulty.values(), key=lambda faulty: faulty.reference)
    return [
        FaultyAdapter(name=faulty.reference, faults=list(faulty.faults))
        for faulty in found
        if faulty.reference.startswith(prefix)
        and faulty.reference > after
        and (not end or faulty.reference <= end)
        and caller.may_use(faulty.name)
    ]


def _is_use_told(service: Service, caller: Caller) -> bool:
    return service.keys is None or caller.is_admin


def _write(rows: Iterator[AdapterInfo]) -> Iterator[bytes]:
    while some := list(islice(rows, NUM_AT_ONCE)):
        yield ROWS.dump_json(some)[1:-1]
        time.sleep(0)  # else the event loop would wait for Python's lock again and again


def _module(row: ModuleStatistics) -> ModuleInfo:
    return ModuleInfo(
        module=row.module,
        num_rows=row.num_rows,
        num_entries=row.num_entries,
        num_kept=row.num_kept,
        density=row.density,
        empty_rows=row.empty_rows,
        max_abs=row.max_abs,
        norm_b=row.norm_b,
        norm_delta=row.norm_delta,
    )
