"""Stores of servers that are killed while their adapters change: the next server serves them."""

import signal
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from lori.base_model import BaseModel
from lori.config import CONFIG_FILE
from lori.format import WEIGHTS_FILE, load_adapter
from lori.store.aliases import ALIASES_FOLDER
from lori.store.locks import LOCKS_FOLDER
from lori.store.store import AdapterStore
from tests.server.forked import start_forked
from tests.server.live import LIMIT_S, Live, wait_until
from tests.server.rig import write_adapter

MODULE = "tests.server.open_admin"
NUM_KILLS = 3


def flags(model: Path, store: Path) -> list[str]:
    settings = {"--model": str(model), "--adapters": str(store), "--dtype": "float32", "--threads": "1", "--kv-cache-gib": "0.02"}
    return [part for pair in settings.items() for part in pair]


def upload(client: httpx.Client, name: str, folder: Path) -> httpx.Response:
    files = {"config": (folder / CONFIG_FILE).read_bytes(), "weights": (folder / WEIGHTS_FILE).read_bytes()}
    return client.post("/adapters", data={"name": name}, files=files)


def change_until_killed(live: Live, drafts: list[Path], statuses: Counter[int]) -> None:
    """Upload, alias and delete until the server no longer answers."""
    with suppress(httpx.HTTPError), httpx.Client(base_url=live.url, timeout=LIMIT_S) as client:
        for repetition in range(100_000):
            name = f"x{repetition % 3}"
            draft = drafts[repetition % len(drafts)]
            for reply in (
                upload(client, name, draft),
                upload(client, name, drafts[(repetition + 1) % len(drafts)]),
                client.put(f"/adapters/{name}/alias", json={"adapter": f"{name}@{load_adapter(draft).version}"}),
                client.delete(f"/adapters/{name}") if repetition % 2 else client.get(f"/adapters/{name}"),
            ):
                statuses[reply.status_code] += 1


def leave_scratch(store: AdapterStore) -> None:
    """Put into `store` the files that a writer of x0 and x1 leaves if killed before a rename, where our kill seldom falls."""
    half_written = store.root / ".x0@0123456789ab-left"
    half_written.mkdir()
    (half_written / CONFIG_FILE).write_text("{")
    (store.root / ".x1@removed").mkdir()
    (store.root / ALIASES_FOLDER / ".x1@left").write_text("x1@01234")


def files_in(folder: Path) -> set[str]:
    """Return the names of all that lies in `folder`, hidden or not."""
    return {path.name for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("num_changes", [3 + 7 * kill for kill in range(NUM_KILLS)])
def test_a_killed_server_leaves_a_sound_store(writer_model: Path, writer: BaseModel, tmp_path: Path, num_changes: int) -> None:
    drafts = [tmp_path / f"draft-{seed}" for seed in range(3)]
    for seed, draft in enumerate(drafts):
        write_adapter(draft, writer, seed=seed)
    store, statuses = AdapterStore(tmp_path / "store"), Counter[int]()
    write_adapter(store.root / "first", writer, seed=9)
    with start_forked(tmp_path / "log", *flags(writer_model, store.root), module=MODULE) as live:
        changes = threading.Thread(target=change_until_killed, args=(live, drafts, statuses))
        changes.start()
        wait_until(lambda: statuses.total() >= num_changes, "changes")
        live.process.send_signal(signal.SIGKILL)
        changes.join(LIMIT_S)
    assert set(statuses) <= {200, 201}
    known = {load_adapter(draft).version for draft in drafts}
    for entry in store.list():
        assert entry.load(writer.identity).version in known | {load_adapter(store.root / "first").version}
    meant = {name: entry.version for name, entry in store.current().items()}
    leave_scratch(store)
    with start_forked(tmp_path / "log", *flags(writer_model, store.root), module=MODULE) as live:
        rows = live.client.get("/adapters").json()["adapters"]
        assert {row["name"]: row["version"] for row in rows} == meant
        for name, version in meant.items():
            assert live.generate(prompt="x", adapter=name, max_tokens=2)["adapter"][0]["version"] == version
        for name in ("x0", "x1", "x2"):
            assert upload(live.client, name, drafts[0]).status_code == 201
            assert live.client.delete(f"/adapters/{name}").status_code == 200
    assert files_in(store.root) == {"first", ALIASES_FOLDER, LOCKS_FOLDER}, "no scratch is left"
    assert files_in(store.root / "first") == {CONFIG_FILE, WEIGHTS_FILE}
    assert files_in(store.root / ALIASES_FOLDER) == set()
    assert files_in(store.root / LOCKS_FOLDER) <= {"x0", "x1", "x2"}
