"""Named merges that come and go while the server runs, over a socket."""

import errno
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from lori.base_model import load_base_model
from lori.named_merge import MergedAdapter, NamedMerge, read_named_merges
from lori.store.entry import Entry
from server.errors import ConflictError, StoreError
from server.loading import load_service
from server.service.merge_admin import MergeAdmin
from server.service.named_merges import NamedMerges
from server.service.service import Service
from server.settings import Settings
from tests.server.keyed import ACME, ADMIN, bearer, served, write_keys
from tests.server.replies import refusal
from tests.server.rig import write_adapter, write_adapters, write_merge

pytestmark = pytest.mark.slow
PROMPT = "12 + 3 ="


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def make_service(model: Path, place: Path, **changes: Any) -> Service:
    """Return a service with an empty folder of merges. The tenant `acme` may use all adapters."""
    (place / "merges").mkdir()
    store = write_adapters(place / "adapters", load_base_model(str(model), torch.float32, "eager"))
    settings = {"model": str(model), "adapters": str(store), "merges": place / "merges", "keys": write_keys(place)}
    settings |= {"demo_adapters": False, "dtype": "float32", "kv_cache_gib": 0.05}
    return load_service(Settings.model_validate(settings | changes))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("merge-admin")


@pytest.fixture(scope="module")
def admin(writer_model: Path, place: Path) -> Iterator[httpx.Client]:
    with served(make_service(writer_model, place), ADMIN) as client:
        yield client


@pytest.fixture(scope="module")
def base_digest(writer_model: Path) -> str:
    return load_base_model(str(writer_model), torch.float32, "eager").identity.digest


def merge_of(place: Path, base_digest: str, weights: Mapping[str, float], **fields: Any) -> dict[str, Any]:
    """Return the content of a merge's file. It names adapters by their versions in the store."""
    names = {name: f"{name}@{Entry(name, place / 'adapters' / name).version}" for name in weights}
    adapters = [{"reference": names[name], "weight": weight} for name, weight in weights.items()]
    return {"base_digest": base_digest, "adapters": adapters} | fields


def generate(client: httpx.Client, adapter: Any, **fields: Any) -> httpx.Response:
    body = {"prompt": PROMPT, "adapter": adapter, "max_tokens": 8, "temperature": 0} | fields
    return client.post("/generate", json=body, headers=bearer(ACME))


def terms(reply: httpx.Response) -> list[tuple[str, float]]:
    return [(adapter["name"], adapter["weight"]) for adapter in reply.raise_for_status().json()["adapter"]]


def test_a_merge_is_published_replaced_and_deleted(admin: httpx.Client, place: Path, base_digest: str) -> None:
    assert generate(admin, "both").status_code == 404
    content = merge_of(place, base_digest, {"math": 0.75, "safety": -0.25}, about="by hand", scores={"rows": 0.5})
    row = admin.put("/merges/both", json=content).raise_for_status().json()
    assert (row["name"], row["about"]) == ("both", "by hand")
    assert [one["name"] for one in row["adapters"]] == ["math", "safety"]
    assert admin.get("/adapters").json()["merges"] == [row]
    reply = generate(admin, "both")
    assert terms(reply) == [("math", 0.75), ("safety", -0.25)]
    assert reply.json()["text"] == generate(admin, ["math", "safety"], weights=[0.75, -0.25]).json()["text"]
    assert read_named_merges(place / "merges", base_digest) == {"both": NamedMerge.model_validate(content)}

    content = merge_of(place, base_digest, {"math": 1, "intent": 2})
    content["adapters"][0]["block_weights"] = [0.5, 1.5]
    replaced = admin.put("/merges/both", json=content).raise_for_status().json()
    assert replaced["adapters"][0]["block_weights"] == [0.5, 1.5]
    assert terms(generate(admin, "both")) == [("math", 1.0), ("intent", 2.0)]
    assert read_named_merges(place / "merges", base_digest) == {"both": NamedMerge.model_validate(content)}

    assert admin.delete("/merges/both").raise_for_status().json() == replaced
    assert generate(admin, "both").status_code == 404
    assert [*(place / "merges").iterdir()] == []
    assert refusal(admin.delete("/merges/both"), 404)["message"] == "there is no merge 'both'"


def test_a_merge_that_does_not_fit_is_refused(admin: httpx.Client, place: Path, base_digest: str) -> None:
    sound = merge_of(place, base_digest, {"math": 0.5, "safety": 0.5})
    first, second = sound["adapters"]
    absent = {"reference": "absent@0123456789ab", "weight": 1}
    for change, param, message in (
        ({"base_digest": "b" * 64}, "base_digest", "it is of another base"),
        ({"weights": [1]}, "weights", "unknown field"),
        ({"adapters": []}, "adapters", "at least 1 item"),
        ({"adapters": [first, first]}, "adapters", "twice, expected each adapter once"),
        ({"adapters": [{**first, "reference": "math"}]}, "adapters.0.reference", "should match pattern"),
        ({"adapters": [{**first, "weight": "1"}]}, "adapters.0.weight", "valid number"),
        ({"adapters": [{**first, "wait": 1}]}, "adapters.0.wait", "unknown field: expected block_weights, reference, weight"),
        ({"adapters": [first, second, absent]}, "adapters.2.reference", "there is no absent@"),
    ):
        error = refusal(admin.put("/merges/both", json=sound | change), 400)
        assert error["param"] == param
        assert message in error["message"]
    base, taken = admin.get("/adapters").json()["base_model"], "is also the name of an adapter or the base"
    names = {"Both": (400, "is no adapter's name"), "auto": (400, "'auto'"), "math": (409, taken), base: (409, taken)}
    for name, (status, message) in names.items():
        assert message in refusal(admin.put(f"/merges/{name}", json=sound), status)["message"]
    assert [*(place / "merges").iterdir()] == []


def test_only_an_admin_changes_merges(admin: httpx.Client, place: Path, base_digest: str) -> None:
    content = merge_of(place, base_digest, {"math": 0.5, "safety": 0.5})
    for reply in (
        admin.put("/merges/both", json=content, headers=bearer(ACME)),
        admin.delete("/merges/both", headers=bearer(ACME)),
    ):
        assert "needs a key of the role 'admin'" in refusal(reply, 403)["message"]


def test_a_folder_that_fails_changes_nothing(writer_model: Path, tmp_path: Path, base_digest: str) -> None:
    with served(make_service(writer_model, tmp_path), ADMIN) as client:
        content = merge_of(tmp_path, base_digest, {"math": 0.5, "safety": 0.5})
        client.put("/merges/both", json=content).raise_for_status()
        (tmp_path / "merges").rename(tmp_path / "moved")
        for reply in (client.put("/merges/other", json=content), client.delete("/merges/both")):
            assert "the folder of named merges failed: No such file" in refusal(reply, 503)["message"]
        assert [one["name"] for one in client.get("/adapters").json()["merges"]] == ["both"]


def test_without_a_folder_no_merge_can_come(writer_model: Path, tmp_path: Path, base_digest: str) -> None:
    with served(make_service(writer_model, tmp_path, merges=None), ADMIN) as client:
        content = merge_of(tmp_path, base_digest, {"math": 0.5})
        for reply in (client.put("/merges/both", json=content), client.delete("/merges/both")):
            assert "start the server with --merges FOLDER" in refusal(reply, 409)["message"]


def test_an_adapter_of_the_name_refuses_a_merge_and_no_start(
    writer_model: Path, tmp_path: Path, base_digest: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Regression: a merge and then an adapter of one name, each published in its turn, and the server did not start again."""
    service = make_service(writer_model, tmp_path)
    content = merge_of(tmp_path, base_digest, {"math": 0.5, "safety": 0.5})
    with served(service, ADMIN) as client:
        client.put("/merges/both", json=content).raise_for_status()
        write_adapter(tmp_path / "adapters" / "both", load_base_model(str(writer_model), torch.float32, "eager"), seed=7)
        client.post("/adapters/both/load").raise_for_status()
        assert terms(generate(client, "both")) == [("both", 1.0)]
        assert "is also the name of an adapter" in refusal(client.put("/merges/both", json=content), 409)["message"]
    with served(load_service(service.settings), ADMIN) as client:
        assert "the merge 'both' cannot be requested: an adapter has its name" in caplog.text
        assert terms(generate(client, "both")) == [("both", 1.0)]
        client.delete("/merges/both").raise_for_status()


def test_what_no_file_can_hold_is_refused(admin: httpx.Client, place: Path, base_digest: str) -> None:
    """Regression: half a surrogate pair was written, and no server could read the file, nor clients the list."""
    sound = merge_of(place, base_digest, {"math": 0.5})
    for field, value in (("about", '"\\ud800"'), ("scores", '{"\\ud800": 1}'), ("about", f'"{"é" * 5000}"')):
        content = json.dumps(sound | {field: None}).replace(f'"{field}": null', f'"{field}": {value}')
        reply = admin.put("/merges/both", content=content.encode(), headers={"Content-Type": "application/json"})
        assert refusal(reply, 400)["message"].startswith(field)
    assert [*(place / "merges").iterdir()] == []


@pytest.mark.anyio
async def test_a_folder_that_may_not_be_written_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("server.service.merge_admin.replace_file", fail)
    merge = NamedMerge(base_digest="b" * 64, adapters=[MergedAdapter(reference="math@0123456789ab", weight=1)])
    admin = MergeAdmin(NamedMerges(), tmp_path, "b" * 64)
    with pytest.raises(ConflictError, match="folder of named merges: Read-only file system: mount it writable, such as by LORI"):
        await admin.publish("both", merge)
    assert admin.merges.by_name == {}


@pytest.mark.anyio
async def test_a_replica_that_joins_reads_the_folder_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    digest = "b" * 64
    adapter = {"reference": "math@0123456789ab", "weight": 1.0}
    merge = NamedMerge.model_validate({"base_digest": digest, "adapters": [adapter]})
    write_merge(tmp_path, "new", digest, merge.adapters)
    admin = MergeAdmin(NamedMerges({"old": merge}), tmp_path, digest, base_names={"smol"})
    await admin.catch_up()
    assert admin.merges.by_name == {"new": merge}
    (tmp_path / "torn.json").write_text("{")
    await admin.catch_up()
    assert admin.merges.by_name == {"new": merge}
    assert "torn.json: it is no sound named merge" in caplog.text
    (tmp_path / "torn.json").rename(tmp_path / "torn")
    write_merge(tmp_path, "smol", digest, merge.adapters)
    await admin.catch_up()
    assert admin.merges.by_name == {"new": merge}
    assert "has smol, which is also the name of the base" in caplog.text
    with pytest.raises(StoreError, match="folder of named merges failed: No such file"):
        await MergeAdmin(admin.merges, tmp_path / "absent", digest).catch_up()
