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
FIELDS = {"config": CONFIG_FILE, "weights": WEIGHTS_FILE, "card": CARD_FILE}
PROMPT = "The quick brown fox"


@dataclass(frozen=True, slots=True)
class Office:
    """A server at whose socket `client` asks as an admin."""

    client: httpx.Client
    service: Service
    store: AdapterStore
    base: BaseModel
    drafts: Path
    """Where adapters are made that are not the server's."""

    def draft(self, name: str, seed: int, **changes: Any) -> Path:
        """Makes an adapter that the server does not know, and returns its folder."""
        write_adapter(self.drafts / f"{name}-{seed}", self.base, seed=seed, **changes)
        return self.drafts / f"{name}-{seed}"

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.client.post(path, json=body or None)

    def upload(self, name: str, folder: Path, **changes: Any) -> httpx.Response:
        """Sends the files of `folder`; `changes` of fields come in their place, None leaves one out."""
        files = {field: (folder / file).read_bytes() for field, file in FIELDS.items() if (folder / file).exists()}
        return self.send({"name": name} | files | changes)

    def send(self, fields: Mapping[str, Any], headers: Mapping[str, str] = ADMIN) -> httpx.Response:
        """Sends a form: bytes are files, text is text."""
        files = {key: (f"../{key}", value) for key, value in fields.items() if isinstance(value, bytes)}
        texts = {key: value for key, value in fields.items() if isinstance(value, str)}
        return self.client.post("/adapters", data=texts, files=files, headers=headers)

    def have(self, name: str, seed: int, **changes: Any) -> Adapter:
        """Uploads an adapter, which must go well, and returns what it is."""
        folder = self.draft(name, seed, **changes)
        reply = self.upload(name, folder)
        assert reply.status_code == 201, reply.text
        return self.entry_of(name).load()

    def entry_of(self, name: str) -> Entry:
        """Returns where the server reads what `name` means there."""
        return self.service.registry.by_name[name].entry

    def generate(self, adapter: Any, **body: Any) -> dict[str, Any]:
        reply = self.ask(adapter, **body)
        assert reply.status_code == 200, reply.text
        answer: dict[str, Any] = reply.json()
        return answer

    def ask(self, adapter: Any, **body: Any) -> httpx.Response:
        return self.client.post("/generate", json={"prompt": PROMPT, "max_tokens": 12, "adapter": adapter} | body)

    def row(self, name: str) -> dict[str, Any] | None:
        """Returns the row of an adapter in the list, None where it is not there."""
        rows = self.client.get("/adapters").json()["adapters"]
        return next((row for row in rows if row["name"] == name), None)

    def drop(self, adapter: Adapter) -> None:
        """Has the engine forget an adapter that nobody uses: it is read again for the next who asks."""
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
    """Runs a server with the store `place`/store, which may be empty, until the block ends."""
    store = place / "store"
    store.mkdir(exist_ok=True)
    keys = place / "keys.toml"
    keys.write_text(KEYS)
    given = {
        "adapters": store if has_store else None,
        "keys": keys,
        "model": str(model),
        "dtype": "float32",
        "threads": 1,
        "kv_cache_gib": 0.02,
        "resident_gib": 0.05,
    } | settings
    service = load_service(Settings(**given))
    with serve_here(service) as client:
        client.headers.update(ADMIN)
        yield Office(client, service, AdapterStore(store), base, place / "drafts")
