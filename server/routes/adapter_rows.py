"""Rows of the adapter list and details of single adapters, as clients see them.

Thread-safe. Building thousands of rows takes a while, so call it off the event loop.
"""

import time
from collections.abc import Callable, Iterator
from itertools import islice

from pydantic import TypeAdapter
from pydantic_core import to_json

from lori.compare.statistics import ModuleStatistics, total
from lori.named_merge import NamedMerge
from server.access.caller import Caller
from server.catalog.files import Details
from server.engine.adapters.registry import Registered
from server.engine.adapters.residents import TierUsage
from server.schemas.adapters import AdapterDetail, AdapterInfo, FaultyAdapter, MergedAdapterInfo, ModuleInfo, NamedMergeInfo
from server.service.service import Service

NUM_AT_ONCE = 32
"""Rows that are written before other threads may run: about half a millisecond."""
ROWS = TypeAdapter(list[AdapterInfo])
FAULTY = TypeAdapter(list[FaultyAdapter])
MERGES = TypeAdapter(list[NamedMergeInfo])
NO_USAGE = TierUsage()


def describe(service: Service, adapter: Registered, usage: TierUsage, *, shows_usage: bool) -> AdapterInfo:
    """Return the row of an adapter in a list."""
    summary, use = adapter.summary, service.uses.get(adapter.summary.name, adapter.summary.digest)
    return AdapterInfo(
        name=summary.name,
        version=summary.version,
        rank=summary.rank,
        alpha=summary.alpha,
        sparsity=summary.sparsity,
        density=1 - summary.sparsity,
        templates=list(summary.templates),
        merge_weights=dict(summary.merge_weights),
        has_prompt_statistics=service.admission.weights.can_weigh(summary),
        metrics=dict(summary.metrics),
        bytes_on_disk=summary.num_bytes,
        bytes_loaded=usage.bytes_loaded,
        bytes_resident=usage.bytes_resident,
        tier=usage.tier,
        is_pinned=service.admin.pins.get(summary.name) == summary.digest,
        num_using=use.num_using if shows_usage else None,
        last_used=use.last_used if shows_usage else None,
        num_requests=use.num_requests if shows_usage else None,
    )


def describe_one(service: Service, adapter: Registered, *, shows_usage: bool = True) -> AdapterInfo:
    """Return the row of a single adapter."""
    return describe(service, adapter, service.engine.tier_usage().get(adapter.summary.digest, NO_USAGE), shows_usage=shows_usage)


def describe_details(service: Service, adapter: Registered, details: Details, caller: Caller) -> AdapterDetail:
    """Return the details of an adapter."""
    registry, summary = service.registry, adapter.summary
    versions = [version.summary.version for version in registry.versions(summary.name)]
    others = (other for other in registry.find(summary.digest, ()) if other.entry.folder == adapter.entry.folder)
    aliases = {other.summary.name for other in others if registry.by_name.get(other.summary.name) == other} - {summary.name}
    return AdapterDetail(
        **describe_one(service, adapter, shows_usage=_shows_usage(service, caller)).model_dump(),
        versions=versions,
        aliases=sorted(filter(caller.may_use, aliases)),
        card=details.card,
        targets=list(summary.targets),
        basis=str(summary.basis),
        modules=list(map(_module, details.modules)),
        total=_module(total(details.modules)),
    )


def describe_merge(service: Service, name: str, merge: NamedMerge) -> NamedMergeInfo:
    """Return the row of a named merge."""
    adapters = [MergedAdapterInfo.model_validate(adapter, from_attributes=True) for adapter in merge.adapters]
    return NamedMergeInfo(name=name, adapters=adapters, about=merge.about, missing=service.merges.missing(merge))


def encode_list(service: Service, caller: Caller, prefix: str, after: str, limit: int | None) -> bytes:
    """Return the JSON reply of GET /adapters: names that the caller may use, that begin with `prefix` and come after `after`."""
    by_name, merges, usages = service.registry.by_name, service.merges.usable(caller.may_use), service.engine.tier_usage()
    usable = {*filter(caller.may_use, by_name), *merges}
    names = sorted(name for name in usable if name.startswith(prefix) and name > after)
    shown = names if limit is None else names[:limit]
    end = shown[-1] if len(shown) < len(names) else ""
    shows_usage = _shows_usage(service, caller)
    adapters = [by_name[name] for name in shown if name not in merges]
    pairs = ((adapter, usages.get(adapter.summary.digest, NO_USAGE)) for adapter in adapters)
    rows = (describe(service, adapter, usage, shows_usage=shows_usage) for adapter, usage in pairs)
    written = b",".join(_write(rows))

    def is_on_page(name: str) -> bool:
        return name.startswith(prefix) and name > after and (not end or name <= end)

    faulty = FAULTY.dump_json(_faulty(service, caller, is_on_page))
    written_merges = MERGES.dump_json([describe_merge(service, name, merges[name]) for name in shown if name in merges])
    default_merge = to_json(service.admission.weights.default_merge)
    parts = (to_json(service.base_model), written, faulty, written_merges, default_merge, to_json(end or None))
    return b'{"base_model":%b,"adapters":[%b],"faulty":%b,"merges":%b,"default_merge":%b,"next":%b}' % parts


def _faulty(service: Service, caller: Caller, is_on_page: Callable[[str], bool]) -> list[FaultyAdapter]:
    faulty_adapters = sorted(service.registry.faulty.values(), key=lambda faulty: faulty.reference)
    return [
        FaultyAdapter(name=faulty.reference, faults=list(faulty.faults))
        for faulty in faulty_adapters
        if is_on_page(faulty.reference) and caller.may_use(faulty.name)
    ]


def _shows_usage(service: Service, caller: Caller) -> bool:
    return service.keys is None or caller.is_admin


def _write(rows: Iterator[AdapterInfo]) -> Iterator[bytes]:
    while batch := list(islice(rows, NUM_AT_ONCE)):
        yield ROWS.dump_json(batch)[1:-1]
        time.sleep(0)  # otherwise the event loop would wait for the GIL again and again


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
