"""Replies of several replicas merged into one server's: metrics labelled by replica, and adapters with the figures of all."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

LABEL = "replica"


def merged_metrics(texts: Mapping[str, str]) -> bytes:
    """Return the samples of `texts`, which are in Prometheus's format, by the name of the replica that each is of."""
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
            for found in text_string_to_metric_families(text):
                family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
                for sample in found.samples:
                    family.add_sample(sample.name, {**sample.labels, LABEL: replica}, sample.value)
        yield from families.values()


TIERS = ("disk", "loaded", "resident")
"""From far to near."""


def merged_adapters(answers: Sequence[bytes]) -> bytes:
    """Return the replicas' replies to `GET /adapters`, or of one adapter, as one: the first, with the figures of all.

    Uses are summed; an adapter is where it is nearest, with the bytes that it has there, and pinned where one has it so. What is
    damaged for one of them is listed as faulty.
    """
    first, *others = map(json.loads, answers)
    of_others = {(row["name"], row["version"]): list[dict[str, Any]]() for row in _rows(first)}
    for document in others:
        for row in _rows(document):
            of_others.get((row["name"], row["version"]), []).append(row)
    for row in _rows(first):
        _merge(row, [row, *of_others[row["name"], row["version"]]])
    if "faulty" in first:
        first["faulty"] = _faulty([first, *others])
    return json.dumps(first, ensure_ascii=False, separators=(",", ":")).encode()


def _faulty(documents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    faults: dict[str, dict[str, None]] = {}  # as a set, in order
    for row in (row for document in documents for row in document.get("faulty", ())):
        faults.setdefault(row["name"], {}).update(dict.fromkeys(row["faults"]))
    return [{"name": name, "faults": [*found]} for name, found in sorted(faults.items())]


def _rows(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from document.get("adapters", [document])


def _merge(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    row["tier"] = max((of["tier"] for of in rows), key=TIERS.index)
    row["is_pinned"] = any(of["is_pinned"] for of in rows)
    for name in ("bytes_loaded", "bytes_resident"):
        row[name] = max(of[name] for of in rows)
    for name, together in (("num_using", sum), ("num_requests", sum), ("last_used", max)):
        known = [of[name] for of in rows if of[name] is not None]  # of some callers' none is
        row[name] = together(known) if known else None
