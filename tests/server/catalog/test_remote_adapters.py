"""Servers whose adapters lie at one address, each with its own cache: all serve the changes of one, and faults stay apart."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest

from lori.base_model import BaseModel
from lori.config import CONFIG_FILE
from lori.format import CARD_FILE, WEIGHTS_FILE
from tests.lori.remotes import LIMIT_S, Broken, Gate, WatchedFileSystem, let
from tests.server.forked import start_forked
from tests.server.office import Office, open_office

NO_CACHES = {"adapter_cache_gib": 0, "loaded_gib": 0}


@contextmanager
def offices(number: int, model: Path, base: BaseModel, place: Path, url: str, **settings: Any) -> Iterator[list[Office]]:
    """Run `number` servers whose adapters lie at `url`."""
    with ExitStack() as stack:
        opened = []
        for one in range(number):
            (place / str(one)).mkdir()
            given = {"adapters": url, "adapter_cache": place / "cache", "delete_grace_s": 0} | settings
            opened.append(stack.enter_context(open_office(model, base, place / str(one), **given)))
        yield opened
        WatchedFileSystem.before = staticmethod(let)


@pytest.fixture
def watched() -> str:
    """Return the address of an empty store."""
    WatchedFileSystem.reset()
    fsspec.filesystem("watched").makedirs("/store")
    return "watched:///store"


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    (tmp_path / "shared").mkdir()
    return tmp_path / "shared"


def files(store: Path) -> list[str]:
    return sorted(str(file.relative_to(store)) for file in store.rglob("*") if file.is_file())


def upload(office: Office, name: str, seed: int) -> str:
    reply = office.upload(name, office.draft(name, seed))
    assert reply.status_code == 201, reply.text
    return str(reply.json()["version"])


def failure(office: Office, adapter: str) -> str:
    """Return the error message for an adapter that cannot be served."""
    reply = office.ask(adapter)
    assert reply.status_code == 500, reply.text
    assert reply.json()["error"]["type"] == "AdapterError"
    return str(reply.json()["error"]["message"])


@pytest.mark.slow
def test_an_adapter_published_by_one_server_is_served_by_the_others(
    writer_model: Path, writer: BaseModel, tmp_path: Path, shared: Path
) -> None:
    with offices(2, writer_model, writer, tmp_path, f"file://{shared}") as (ours, theirs):
        first = upload(ours, "mine", 1)
        assert theirs.ask("mine").status_code == 404
        assert theirs.post("/adapters/mine/load").json()["version"] == first
        expected = ours.generate("mine")["text"]
        assert theirs.generate("mine")["text"] == expected != theirs.generate(None)["text"]
        second = upload(theirs, "mine", 2)
        assert ours.post("/adapters/mine/load").json()["version"] == second
        assert ours.generate("mine")["text"] == theirs.generate("mine")["text"] != expected
        assert ours.generate(f"mine@{first}")["text"] == expected
        assert ours.client.put("/adapters/prod/alias", json={"adapter": f"mine@{first}"}).status_code == 200
        assert theirs.post("/adapters/prod/load").json()["version"] == first
        assert theirs.generate("prod")["text"] == expected
        assert theirs.client.get("/adapters/prod").json()["bytes_on_disk"] > 1000
        assert theirs.client.delete("/adapters/prod").status_code == 200
        assert ours.client.delete("/adapters/prod").status_code == 200
        assert ours.client.delete("/adapters/mine").status_code == 200
        assert theirs.post("/adapters/mine/load").status_code == 404
        assert files(shared) == []


@pytest.mark.slow
def test_a_change_that_all_servers_get_is_made_once(writer_model: Path, writer: BaseModel, tmp_path: Path, shared: Path) -> None:
    with offices(3, writer_model, writer, tmp_path, f"file://{shared}") as all_of_them, ThreadPoolExecutor(3) as pool:
        draft = all_of_them[0].draft("mine", 1)
        replies = [*pool.map(lambda office: office.upload("mine", draft), all_of_them)]
        assert [reply.status_code for reply in replies] == [201] * 3
        version = replies[0].json()["version"]
        folder = f"mine@{version}"
        assert files(shared) == [".aliases/mine", f"{folder}/{CONFIG_FILE}", f"{folder}/{WEIGHTS_FILE}"]
        body = {"adapter": "mine"}
        replies = [*pool.map(lambda office: office.client.put("/adapters/prod/alias", json=body), all_of_them)]
        assert [reply.status_code for reply in replies] == [200] * 3
        assert len({office.generate("prod")["text"] for office in all_of_them}) == 1
        for name in ("prod", "mine"):
            replies = [*pool.map(lambda office, name=name: office.client.delete(f"/adapters/{name}"), all_of_them)]
            assert [reply.status_code for reply in replies] == [200] * 3, [reply.text for reply in replies]
        assert [office.ask("mine").status_code for office in all_of_them] == [404] * 3
        assert files(shared) == []


@pytest.mark.slow
def test_files_deleted_by_one_server_can_be_read_by_others_for_a_while(
    writer_model: Path, writer: BaseModel, tmp_path: Path, shared: Path
) -> None:
    url = f"file://{shared}"
    with offices(2, writer_model, writer, tmp_path, url, delete_grace_s=3600, **NO_CACHES) as (ours, theirs):
        upload(ours, "mine", 1)
        expected = ours.generate("mine")["text"]
        theirs.post("/adapters/mine/load")
        theirs.drop(theirs.entry_of("mine").load())
        assert ours.client.delete("/adapters/mine").status_code == 200
        assert [Path(file).name for file in files(shared)] == [WEIGHTS_FILE], "the weights stay, but no name leads to them"
        assert ours.post("/adapters/mine/load").status_code == 404
        assert theirs.generate("mine")["text"] == expected
        assert theirs.client.delete("/adapters/mine").status_code == 200
        upload(ours, "mine", 1)
    assert [Path(file).name for file in files(shared)] == ["mine", CONFIG_FILE, WEIGHTS_FILE], "the upload restored the adapter"


@pytest.mark.slow
def test_a_deleted_adapter_without_a_local_copy_fails_by_name(
    writer_model: Path, writer: BaseModel, tmp_path: Path, shared: Path
) -> None:
    with offices(2, writer_model, writer, tmp_path, f"file://{shared}", **NO_CACHES) as (ours, theirs):
        upload(ours, "mine", 1)
        theirs.post("/adapters/mine/load")
        theirs.drop(theirs.entry_of("mine").load())
        assert ours.client.delete("/adapters/mine").status_code == 200
        assert failure(theirs, "mine") == (
            "adapter 'mine' cannot be served: its files are in the store no more: it was deleted there"
        )
        assert theirs.generate(None)["text"]


@pytest.mark.slow
def test_an_adapter_that_does_not_arrive_delays_and_fails_no_other_request(
    writer_model: Path, writer: BaseModel, tmp_path: Path, watched: str, caplog: pytest.LogCaptureFixture
) -> None:
    with offices(1, writer_model, writer, tmp_path, watched, **NO_CACHES) as (office,), ThreadPoolExecutor(1) as pool:
        slow, quick = office.have("slow", 1), office.have("quick", 2)
        folder = f"slow@{slow.version}"
        expected = office.generate("slow")["text"]
        for adapter in (slow, quick):
            office.drop(adapter)
        WatchedFileSystem.before = gate = Gate("fetch", f"{folder}/{WEIGHTS_FILE}")
        asked = pool.submit(office.generate, "slow")
        assert gate.has_come.wait(LIMIT_S)
        assert office.generate("quick")["text"]
        assert not asked.done()
        gate.is_open.set()
        assert asked.result(LIMIT_S)["text"] == expected
        office.drop(slow)
        WatchedFileSystem.before = Broken("fetch", f"{folder}/{WEIGHTS_FILE}")
        message = "fetching failed in the store of the adapters: ConnectionResetError"
        assert failure(office, "slow") == f"adapter 'slow' cannot be served: {message}"
        assert office.generate("quick")["text"]
        assert "secret" not in caplog.text
        WatchedFileSystem.before = staticmethod(let)
        assert office.generate("slow")["text"] == expected


@pytest.mark.slow
def test_a_store_that_does_not_answer_is_reported_to_admins(
    writer_model: Path, writer: BaseModel, tmp_path: Path, watched: str
) -> None:
    with offices(1, writer_model, writer, tmp_path, watched, adapter_timeout_s=LIMIT_S) as (office,):
        office.have("mine", 1)
        WatchedFileSystem.before = Broken("list")
        replies = [
            office.post("/adapters/mine/load"),
            office.upload("other", office.draft("other", 2)),
            office.client.put("/adapters/prod/alias", json={"adapter": "mine"}),
            office.client.delete("/adapters/mine"),
        ]
        assert [reply.status_code for reply in replies] == [503] * 4
        assert all("listing failed in the store of the adapters" in reply.text for reply in replies)
        assert office.generate("mine")["text"], "the local copy is served, and was not withdrawn"
        WatchedFileSystem.before = staticmethod(let)
        assert office.client.delete("/adapters/mine").status_code == 200


@pytest.mark.slow
def test_a_card_is_fetched_on_request(writer_model: Path, writer: BaseModel, tmp_path: Path, watched: str) -> None:
    with offices(1, writer_model, writer, tmp_path, watched) as (office,):
        folder = office.draft("mine", 1)
        (folder / CARD_FILE).write_text("# Mine")
        assert office.upload("mine", folder).status_code == 201
        assert office.client.get("/adapters/mine").json()["card"] == "# Mine"


@pytest.mark.slow
def test_a_real_server_serves_the_adapters_at_an_address(writer_model: Path, adapters: Path, tmp_path: Path) -> None:
    flags = ["--model", str(writer_model), "--adapters", f"file://{adapters}", "--adapter-cache", str(tmp_path / "cache")]
    with start_forked(tmp_path / "log", *flags, "--dtype", "float32", "--threads", "1", "--kv-cache-gib", "0.02") as server:
        names = [row["name"] for row in server.client.get("/adapters").json()["adapters"]]
        assert names == ["intent", "math", "safety"]
        texts = {name: server.generate(prompt="The quick", adapter=name, max_tokens=12)["text"] for name in names}
        assert len(set(texts.values())) == 3
        merged = {"adapter": ["math", "safety"], "merge": "ties", "density": 0.5, "max_tokens": 12}
        assert server.generate(prompt="The quick", **merged)["text"]
    assert not list(adapters.rglob(".locks")), "nothing is written there"
