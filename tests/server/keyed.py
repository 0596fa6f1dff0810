"""Servers in this process that require keys, with a fake engine."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import httpx
from transformers import PreTrainedTokenizerFast

from server.access.key_ring import KeyRing
from server.engine.adapters.registry import Registry
from server.engine.admission import Admission
from server.engine.engine import Engine
from server.engine.thread import EngineThread
from server.service.service import Service
from server.settings import Settings
from server.telemetry.metrics import Metrics
from tests.server.live import HOST, serve_here
from tests.server.rig import FakeEngine

ACME, OTHER, ADMIN, MONITOR = (f"lori_{name}-key" for name in ("acme", "other", "admin", "monitor"))
"""Keys."""


def key_table(key: str, **fields: str) -> str:
    """Return the TOML table of a key."""
    row = {**fields, "sha256": hashlib.sha256(key.encode()).hexdigest()}
    return "\n".join(["[[keys]]", *(f'{name} = "{value}"' for name, value in row.items()), ""])


TABLES = (
    key_table(ACME, id="acme-1", tenant="acme")
    + key_table(OTHER, id="other-1", tenant="other")
    + key_table(ADMIN, id="admin-1", role="admin")
    + key_table(MONITOR, id="monitor-1", role="monitor")
)


def write_keys(place: Path, acme: str = "", other: str = "") -> Path:
    """Write a key file with a key of each role. `acme` and `other` are further TOML lines of the two tenants' tables."""
    file = place / "keys.toml"
    file.write_text(f"[tenants.acme]\n{acme}\n[tenants.other]\n{other}\n{TABLES}")
    return file


def bearer(key: str) -> dict[str, str]:
    """Return the headers that send a key."""
    return {"Authorization": f"Bearer {key}"}


def make_service(
    tokenizer: PreTrainedTokenizerFast,
    keys: Path | None = None,
    *,
    engine: FakeEngine | None = None,
    registry: Registry | None = None,
    num_ingresses: int = 0,
    **settings: Any,
) -> Service:
    """Return a service whose engine generates "x" three times."""
    registry = registry or Registry([])
    return Service(
        settings=Settings(keys=keys, **{"allow_host": [HOST]} | settings),
        base_model="fake",
        registry=registry,
        admission=Admission(tokenizer, registry, 100, max_terms=3),
        engine=EngineThread(cast(Engine, engine or FakeEngine())),
        metrics=Metrics("fake"),
        keys=KeyRing(keys) if keys else None,
        num_ingresses=num_ingresses,
    )


@contextmanager
def served(service: Service, key: str | None = None) -> Iterator[httpx.Client]:
    """Serve `service` until the block ends; the client sends `key`."""
    with serve_here(service) as client:
        if key is not None:
            client.headers.update(bearer(key))
        yield client
