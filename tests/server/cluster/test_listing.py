"""Documents of adapters, merged from those of all replicas."""

import json
from typing import Any

from server.cluster.merged_replies import TIERS, merged_adapters
from server.engine.adapters.residents import Tier


def row(name: str, tier: str, uses: int | None = 0, last: float | None = None, **changes: Any) -> dict[str, Any]:
    defaults = {"tier": tier, "bytes_loaded": 0, "bytes_resident": 9 * (tier == "resident"), "is_pinned": False}
    return {"name": name, "version": "1", "num_using": uses, "num_requests": uses, "last_used": last} | defaults | changes


def merged(*documents: object) -> Any:
    return json.loads(merged_adapters([json.dumps(document).encode() for document in documents]))


def test_all_tiers_are_known() -> None:
    assert set(TIERS) == set(Tier.__args__)  # type: ignore[attr-defined]  # of a Literal


def test_a_list_merges_the_figures_of_all_replicas() -> None:
    first = {"base_model": "base", "next": "b", "adapters": [row("a", "disk", 2, 5.0), row("ä", "resident", 1, 3.0)]}
    second = {"adapters": [row("ä", "loaded", 4, 9.0, bytes_loaded=7, is_pinned=True), row("c", "resident")]}
    listing = merged(first, second, {"adapters": []})
    assert listing == {
        "base_model": "base",
        "next": "b",
        "adapters": [row("a", "disk", 2, 5.0), row("ä", "resident", 5, 9.0, bytes_loaded=7, is_pinned=True)],
    }


def test_another_version_is_another_adapter() -> None:
    assert merged({"adapters": [row("a", "disk", 2)]}, {"adapters": [row("a", "resident", 3, version="2")]})["adapters"] == [
        row("a", "disk", 2)
    ]


def test_one_adapter_is_merged_likewise_and_keeps_its_other_fields() -> None:
    document = merged(row("a", "disk", None, card="# a"), row("a", "loaded", None, bytes_loaded=3, card="# a"))
    assert document == row("a", "loaded", None, bytes_loaded=3, card="# a")


def test_an_adapter_that_one_replica_finds_damaged_is_listed() -> None:
    first = {"adapters": [], "faulty": [{"name": "torn", "faults": ["a", "b"]}]}
    second = {"adapters": [], "faulty": [{"name": "cut", "faults": ["c"]}, {"name": "torn", "faults": ["b", "d"]}]}
    assert merged(first, second)["faulty"] == [{"name": "cut", "faults": ["c"]}, {"name": "torn", "faults": ["a", "b", "d"]}]
    assert merged(second)["faulty"] == second["faulty"]
