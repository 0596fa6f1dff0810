"""Replies of several replicas merged into one: metrics labelled by replica, and adapters with the totals of all."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

LABEL = "replica"


def merged_metrics(texts: Mapping[str, str]) -> bytes:
    """Return the samples of `texts`, in Prometheus's format, labelled with the names of their replicas."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Texts(texts))
    return generate_latest(registry)


class _Texts(Collector):
    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for replica, text in self._texts.items():
            for parsed in text_string_to_metric_families(text):
                family = families.setdefault(parsed.name, Metric(parsed.name, parsed.documentation, parsed.type))
                for sample in parsed.samples:
                    family.add_sample(sample.name, {**sample.labels, LABEL: replica}, sample.value)
        yield from families.values()


TIERS = ("disk", "loaded", "resident")
"""From the slowest to the fastest."""


def merged_adapters(answers: Sequence[bytes]) -> bytes:
    """Return the replicas' replies to `GET /adapters`, or for one adapter, as one: the first, with the totals of all.

    Uses are summed. An adapter has the fastest tier of all, its bytes there, and is pinned if one replica has pinned it. An
    adapter that is damaged for one replica is listed as faulty.
    """
    first, *others = map(json.loads, answers)
    other_rows = {(row["name"], row["version"]): list[dict[str, Any]]() for row in _rows(first)}
    for document in others:
        for row in _rows(document):
            other_rows.get((row["name"], row["version"]), []).append(row)
    for row in _rows(first):
        _merge(row, [row, *other_rows[row["name"], row["version"]]])
    if "faulty" in first:
        first["faulty"] = _faulty([first, *others])
    return json.dumps(first, ensure_ascii=False, separators=(",", ":")).encode()


def _faulty(documents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    faults: dict[str, dict[str, None]] = {}  # as an ordered set
    for row in (row for document in documents for row in document.get("faulty", ())):
        faults.setdefault(row["name"], {}).update(dict.fromkeys(row["faults"]))
    return [{"name": name, "faults": [*row_faults]} for name, row_faults in sorted(faults.items())]


def _rows(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from document.get("adapters", [document])


def _merge(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    row["tier"] = max((other["tier"] for other in rows), key=TIERS.index)
    row["is_pinned"] = any(other["is_pinned"] for other in rows)
    for name in ("bytes_loaded", "bytes_resident"):
        row[name] = max(other[name] for other in rows)
    for name, together in (("num_using", sum), ("num_requests", sum), ("last_used", max)):
        values = [other[name] for other in rows if other[name] is not None]  # None for some callers
        row[name] = together(values) if values else None
