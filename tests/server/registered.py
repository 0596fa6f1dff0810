"""Registered adapters of plain values, for tests that read no file."""

from pathlib import Path

from lori.config import SeededConfig
from lori.store.entry import Entry
from lori.summary import Summary
from lori.template import Template
from server.engine.adapters.registry import Registered

STORE = Path("store")


def registered(
    name: str,
    digest: str,
    *,
    folder: str = "",
    place: Path = STORE,
    stream: int = 0,
    nnz: int = 10,
    templates: tuple[Template, ...] = ("plain",),
) -> Registered:
    """Return a version of an adapter. Its folder is named `name`, or `folder` if `name` is an alias of an adapter there."""
    summary = Summary(
        name=name,
        digest=digest,
        basis=SeededConfig(generator="philox-u24-1", seed=0, stream=stream),
        rank=4,
        max_rank=4,
        alpha=8.0,
        scale=2.0,
        targets=("q_proj",),
        sparsity=0.9,
        nnz=nnz,
        templates=templates,
        merge_weights={},
        metrics={},
        num_bytes=100,
    )
    return Registered(Entry(name, place / f"{folder or name}@{summary.version}"), summary)
