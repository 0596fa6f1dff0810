"""A real server in this process, with keys, whose adapters change while it runs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from lori.adapter import Adapter
from lori.base_model import BaseModel
from lori.config import CONFIG_FILE
from lori.format import CARD_FILE, WEIGHTS_FILE
from lori.prompt_statistics import STATISTICS_FILE
from lori.store.entry import Entry
from lori.store.store import AdapterStore
from server.loading import load_service
from server.service.service import Service
from server.settings import Settings
from tests.server.keyed import bearer, key_table
from tests.server.live import serve_here, wait_until
from tests.server.rig import write_adapter

ADMIN, GUEST = bearer("lori_admin-key"), bearer("lori_guest-key")
KEYS = f"""
[tenants.guest]
adapters = ["open-*"]
{key_table("lori_guest-key", id="guest-1", tenant="guest")}
{key_table("lori_admin-key", id="admin-1", role="admin")}
"""
FIELDS = {"config": CONFIG_FILE, "weights": WEIGHTS_FILE, "card": CARD_FILE, "prompt_statistics": STATISTICS_FILE}
PROMPT = "The quick brown fox"


@dataclass(frozen=True, slots=True)
class Office:
    """A running server, and a client of it with an admin's key."""

    client: httpx.Client
    service: Service
    store: AdapterStore
    base: BaseModel
    drafts: Path
    """The folder of adapters that are not the server's."""

    def draft(self, name: str, seed: int, **changes: Any) -> Path:
        """Write an adapter that the server does not know; return its folder."""
        write_adapter(self.drafts / f"{name}-{seed}", self.base, seed=seed, **changes)
        return self.drafts / f"{name}-{seed}"

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body or None)

    def upload(self, name: str, folder: Path, **changes: Any) -> httpx.Response:
        """Upload the files of `folder`. `changes` replaces form fields; a value of None leaves the field out."""
        files = {field: (folder / file).read_bytes() for field, file in FIELDS.items() if (folder / file).exists()}
        return self.send({"name": name} | files | changes)

    def send(self, fields: Mapping[str, Any], headers: Mapping[str, str] = ADMIN) -> httpx.Response:
        """Send a form. Values of bytes are sent as files, strings as text fields."""
        files = {key: (f"../{key}", value) for key, value in fields.items() if isinstance(value, bytes)}
        texts = {key: value for key, value in fields.items() if isinstance(value, str)}
        return self.client.post("/adapters", data=texts, files=files, headers=headers)

    def have(self, name: str, seed: int, **changes: Any) -> Adapter:
        """Upload an adapter, and return it as the server stored it. Fail if the upload does."""
        folder = self.draft(name, seed, **changes)
        reply = self.upload(name, folder)
        assert reply.status_code == 201, reply.text
        return self.entry_of(name).load()

    def entry_of(self, name: str) -> Entry:
        """Return the store entry that the server reads for `name`."""
        return self.service.registry.by_name[name].entry

    def generate(self, adapter: Any, **body: Any) -> dict[str, Any]:
        reply = self.ask(adapter, **body)
        assert reply.status_code == 200, reply.text
        answer: dict[str, Any] = reply.json()
        return answer

    def ask(self, adapter: Any, **body: Any) -> httpx.Response:
        return self.client.post("/generate", json={"prompt": PROMPT, "max_tokens": 12, "adapter": adapter} | body)

    def row(self, name: str) -> dict[str, Any] | None:
        """Return an adapter's row in the list, or None if it has none."""
        rows = self.client.get("/adapters").json()["adapters"]
        return next((row for row in rows if row["name"] == name), None)

    def drop(self, adapter: Adapter) -> None:
        """Make the engine drop an adapter that no request uses. The next request that names it reads it again."""
        digest = adapter.config.lori.content_digest
        self.service.engine._commands.put(lambda engine: engine.adapter_cache.drop(digest))
        wait_until(lambda: digest not in self.service.engine.tier_usage(), "the engine")

    @property
    def num_resident(self) -> int:
        return len(self.service.engine.tier_usage())

    def wait_until_idle(self) -> None:
        wait_until(lambda: self.service.num_requests == 0 and self.service.engine.num_requests == 0, "the end of all requests")


@contextmanager
def open_office(model: Path, base: BaseModel, place: Path, *, has_store: bool = True, **settings: Any) -> Iterator[Office]:
    """Run a server with the store `place`/store, which may be empty, until the block ends."""
    store = place / "store"
    store.mkdir(exist_ok=True)
    keys = place / "keys.toml"
    keys.write_text(KEYS)
    options = {
        "adapters": store if has_store else None,
        "keys": keys,
        "model": str(model),
        "dtype": "float32",
        "threads": 1,
        "kv_cache_gib": 0.02,
        "resident_gib": 0.05,
    } | settings
    service = load_service(Settings(**options))
    with serve_here(service) as client:
        client.headers.update(ADMIN)
        yield Office(client, service, AdapterStore(store), base, place / "drafts")
