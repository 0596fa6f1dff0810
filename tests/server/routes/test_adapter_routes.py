"""The routes that add, change and remove adapters, over a socket: their effects and their refusals."""

import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from lori.base_model import BaseModel
from lori.compare.statistics import statistics
from lori.config import CONFIG_FILE
from lori.format import WEIGHTS_FILE, load_adapter, read_config, write_record
from server.catalog.admin import MAX_WAITING
from server.catalog.files import Details
from tests.server.live import LIMIT_S, wait_until
from tests.server.office import ADMIN, GUEST, Office, open_office
from tests.server.replies import refusal
from tests.server.rig import write_adapter

MODULE_FIELDS = ("module", "num_rows", "num_entries", "num_kept", "density", "empty_rows", "max_abs")


@pytest.fixture(scope="module")
def office(writer_model: Path, writer: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    """Yield a server that was started with an empty store. Each test uses its own names."""
    with open_office(writer_model, writer, tmp_path_factory.mktemp("office"), max_rank=8) as opened:
        yield opened


def test_an_upload_is_served_at_once(office: Office) -> None:
    folder = office.draft("first", 1)
    (folder / "README.md").write_text("# The *first*")
    reply = office.upload("first", folder)
    assert reply.status_code == 201, reply.text
    assert reply.headers["location"] == "/adapters/first"
    row = reply.json()
    adapter = load_adapter(folder)
    assert (row["name"], row["version"], row["rank"], row["alpha"]) == ("first", adapter.version, 4, 8.0)
    assert row["density"] == 1 - row["sparsity"] == pytest.approx(adapter.density)
    assert row["bytes_on_disk"] == sum(file.stat().st_size for file in folder.iterdir())
    assert row["tier"] == "resident"
    assert row["bytes_resident"] == row["bytes_loaded"] > 0
    assert (row["is_pinned"], row["num_using"], row["last_used"], row["num_requests"]) == (False, 0, None, 0)
    assert office.row("first") == row
    answer = office.generate("first")
    assert answer["adapter"] == [{"name": "first", "version": adapter.version, "weight": 1.0, "policy": False}]
    assert answer["text"] != office.generate(None)["text"]
    used = office.row("first")
    assert used
    assert used["num_requests"] == 1
    assert used["last_used"] > 1.7e9
    assert office.store.find("first").load().version == adapter.version


def test_an_adapter_is_shown_with_its_card_and_modules(office: Office) -> None:
    adapter = office.have("shown", 2)
    folder = office.store.find("shown").folder
    write_record(folder, read_config(folder), "# A card")
    office.client.put("/adapters/shown-too/alias", json={"adapter": "shown"}).raise_for_status()
    detail = office.client.get("/adapters/shown").json()
    row = office.row("shown")
    assert row
    assert {key: detail[key] for key in row} == row
    assert (detail["versions"], detail["aliases"], detail["card"]) == ([adapter.version], ["shown-too"], "# A card")
    assert (detail["targets"], detail["basis"]) == (list(adapter.config.target_modules), "seed 0, stream 0")
    expected = [{key: getattr(module, key) for key in MODULE_FIELDS} for module in statistics(adapter)]
    assert [{key: module[key] for key in expected[0]} for module in detail["modules"]] == expected
    assert detail["total"]["num_kept"] == adapter.nnz
    assert detail["total"]["norm_delta"] > 0


def test_a_name_means_its_new_version_and_the_old_one_is_reached_by_version(office: Office) -> None:
    old, new = office.have("moving", 3), office.have("moving", 4)
    assert office.generate("moving")["adapter"][0]["version"] == new.version
    assert office.generate(f"moving@{old.version}")["adapter"][0]["version"] == old.version
    assert office.generate(f"moving@{old.version}")["text"] != office.generate("moving")["text"]
    assert office.client.get("/adapters/moving").json()["versions"] == [new.version, old.version]
    assert office.client.get(f"/adapters/moving@{old.version[:6]}").json()["version"] == old.version
    assert [row["name"] for row in office.client.get("/adapters").json()["adapters"]].count("moving") == 1


def test_the_same_upload_again_changes_nothing(office: Office) -> None:
    adapter = office.have("same", 5)
    assert office.upload("same", office.draft("same", 5)).status_code == 201
    assert office.client.get("/adapters/same").json()["versions"] == [adapter.version]


def test_an_alias_moves_a_name_back_to_an_earlier_version(office: Office) -> None:
    old, new = office.have("back", 6), office.have("back", 7)
    row = office.client.put("/adapters/back/alias", json={"adapter": f"back@{old.version}"}).json()
    assert row["version"] == old.version
    assert office.generate("back")["adapter"][0]["version"] == old.version
    assert office.client.get("/adapters/back").json()["versions"] == [old.version, new.version]
    assert office.store.find("back").version == old.version


def test_an_alias_names_an_adapter_or_a_version_and_can_be_moved(office: Office) -> None:
    one, other = office.have("one", 8), office.have("other", 9)
    for reference, adapter in (("one", one), (f"other@{other.version}", other)):
        row = office.client.put("/adapters/either/alias", json={"adapter": reference}).json()
        assert (row["name"], row["version"]) == ("either", adapter.version)
        assert office.generate("either")["adapter"][0] == {
            "name": "either", "version": adapter.version, "weight": 1.0, "policy": False
        }  # fmt: skip
    refusal(office.client.put("/adapters/one/alias", json={"adapter": "other"}), 409)
    refusal(office.client.put("/adapters/either/alias", json={"adapter": "nobody"}), 404)
    error = refusal(office.upload("either", office.draft("either", 1)), 409)
    assert "'either' is an alias" in error["message"]
    error = refusal(office.client.delete("/adapters/other"), 409)
    assert "'either' means other@" in error["message"]
    assert office.generate("other")["adapter"][0]["version"] == other.version, "a refused deletion changes nothing"
    for action in ("pin", "load", "unpin"):
        assert office.post(f"/adapters/either/{action}").json()["name"] == "either"
    error = refusal(office.client.delete(f"/adapters/either@{other.version}"), 409)
    target = f"other@{other.version}"
    assert error["message"] == f"'either' is an alias of {target}: delete 'either', or {target}"
    assert office.generate("either")["adapter"][0]["version"] == other.version
    assert office.client.delete("/adapters/either").json() == {"name": "either", "versions": [], "num_using": 0}
    assert office.ask("either").status_code == 404
    refusal(office.client.get("/adapters/either"), 404)
    assert office.client.delete("/adapters/other").status_code == 200


def test_an_unloaded_adapter_is_gone_until_it_is_loaded_again(office: Office) -> None:
    old, new = office.have("away", 10), office.have("away", 11)
    before = office.num_resident
    text = office.generate("away")["text"]
    reply = office.post("/adapters/away/unload")
    assert reply.status_code == 200
    assert reply.json() == {"name": "away", "versions": [new.version, old.version], "num_using": 0}
    assert office.num_resident == before - 2, "slot and memory are free"
    assert office.row("away") is None
    for reference in ("away", f"away@{old.version}"):
        assert office.ask(reference).status_code == 404
    refusal(office.client.get("/adapters/away"), 404)
    refusal(office.post("/adapters/away/unload"), 404)
    assert office.post("/adapters/away/load").json()["version"] == new.version
    assert office.generate("away")["text"] == text
    assert office.generate(f"away@{old.version}")["adapter"][0]["version"] == old.version


def test_one_version_can_be_unloaded_alone(office: Office) -> None:
    old, new = office.have("partly", 12), office.have("partly", 13)
    error = refusal(office.post(f"/adapters/partly@{new.version}/unload"), 409)
    assert f"partly@{new.version} is what 'partly' means" in error["message"]
    assert office.post(f"/adapters/partly@{old.version}/unload").json()["versions"] == [old.version]
    assert office.ask(f"partly@{old.version}").status_code == 404
    assert office.generate("partly")["adapter"][0]["version"] == new.version


def test_a_deleted_adapter_is_gone_for_good(office: Office) -> None:
    old, new = office.have("gone", 14), office.have("gone", 15)
    refusal(office.client.delete(f"/adapters/gone@{new.version}"), 409)
    assert office.client.delete(f"/adapters/gone@{old.version}").json()["versions"] == [old.version]
    assert office.client.get("/adapters/gone").json()["versions"] == [new.version]
    assert office.client.delete("/adapters/gone").json() == {"name": "gone", "versions": [new.version], "num_using": 0}
    assert office.store.versions("gone") == []
    assert "gone" not in office.store.alias_names()
    for request in ("DELETE /adapters/gone", "POST /adapters/gone/load", "POST /adapters/gone/pin", "POST /adapters/gone/unpin"):
        refusal(office.client.request(*request.split()), 404)
    assert office.ask("gone").status_code == 404


def test_an_alias_of_an_adapter_under_deletion_is_not_written(office: Office) -> None:
    """Regression: the alias was written, then refused. The files could not be deleted, and were served again after a restart."""
    office.have("doomed", 44)
    is_over = threading.Event()
    office.service.engine._commands.put(lambda _: is_over.wait(LIMIT_S))  # the request cannot end earlier
    with ThreadPoolExecutor(1) as pool:
        try:
            asked = pool.submit(office.ask, "doomed")
            wait_until(lambda: (office.row("doomed") or {})["num_using"] == 1, "the request")
            assert office.client.delete("/adapters/doomed").status_code == 202
            error = refusal(office.client.put("/adapters/other/alias", json={"adapter": "doomed"}), 409)
            assert "is being deleted" in error["message"]
            assert "other" not in office.store.alias_names()
        finally:
            is_over.set()
        assert asked.result().status_code == 200
    wait_until(lambda: not office.store.versions("doomed"), "the files to go")


def test_an_unloaded_adapter_can_be_deleted(office: Office) -> None:
    office.have("hidden", 16)
    office.post("/adapters/hidden/unload")
    assert office.client.delete("/adapters/hidden").status_code == 200
    assert office.store.versions("hidden") == []


def test_a_folder_written_by_training_is_loaded_and_reloaded(office: Office) -> None:
    place = office.store.root / "trained"
    first = write_adapter(place, office.base, seed=17)
    assert office.ask("trained").status_code == 404
    assert office.post("/adapters/trained/load").json()["version"] == first.version
    text = office.generate("trained")["text"]
    second = write_adapter(place, office.base, seed=18)
    assert office.post("/adapters/trained/load").json()["version"] == second.version
    assert office.generate("trained")["text"] != text
    assert office.client.get("/adapters/trained").json()["versions"] == [second.version], "the first version is overwritten"
    third = office.have("trained", 19)
    assert office.client.get("/adapters/trained").json()["versions"] == [third.version, second.version]
    assert office.generate(f"trained@{second.version}")["adapter"][0]["version"] == second.version


def test_a_folder_renamed_by_a_new_version_is_still_read(office: Office) -> None:
    """Check requests that were admitted before the renaming and know the folder's old name."""
    first = write_adapter(office.store.root / "renamed", office.base, seed=20)
    office.post("/adapters/renamed/load")
    plain = office.service.registry.by_name["renamed"]
    text = office.generate("renamed")["text"]
    office.have("renamed", 21)
    office.service.registry.put(plain)
    office.drop(first)
    assert not plain.entry.folder.exists()
    assert office.generate("renamed")["text"] == text
    assert office.client.get("/adapters/renamed").json()["modules"]


def test_a_pinned_name_stays_resident_across_versions(office: Office) -> None:
    old = office.have("kept", 22)
    assert office.post("/adapters/kept/pin").json()["is_pinned"] is True
    residents = office.service.engine._engine.adapter_cache.residents
    assert residents.is_pinned(old.config.lori.content_digest)
    for request in ("POST /adapters/kept/unload", "DELETE /adapters/kept"):
        error = refusal(office.client.request(*request.split()), 409)
        assert "unpin it first" in error["message"]
    new = office.have("kept", 23)
    assert residents.is_pinned(new.config.lori.content_digest)
    assert not residents.is_pinned(old.config.lori.content_digest)
    row = office.row("kept")
    assert row
    assert row["is_pinned"] is True
    assert office.client.get(f"/adapters/kept@{old.version}").json()["is_pinned"] is False
    assert office.post("/adapters/kept/unpin").json()["is_pinned"] is False
    assert office.post("/adapters/kept/unpin").status_code == 200
    assert residents.num_pinned == 0
    assert office.client.delete("/adapters/kept").status_code == 200


def test_an_adapter_of_a_tenant_s_policy_cannot_be_withdrawn(office: Office) -> None:
    old, new = office.have("guard", 24), office.have("guard", 25)
    try:
        office.service.required = lambda: ["guard"]
        for request in ("POST /adapters/guard/unload", "DELETE /adapters/guard"):
            error = refusal(office.client.request(*request.split()), 409)
            assert "'guard' is added to all requests of a tenant" in error["message"]
        assert office.client.delete(f"/adapters/guard@{old.version}").status_code == 200, "no policy needs this version"
        newest = office.have("guard", 26)
        office.service.required = lambda: [f"guard@{new.version[:5]}"]
        refusal(office.client.delete(f"/adapters/guard@{new.version}"), 409)
        refusal(office.post("/adapters/guard/unload"), 409)
        assert office.generate("guard")["adapter"][0]["version"] == newest.version
    finally:
        office.service.required = tuple
    assert office.client.delete("/adapters/guard").status_code == 200


def test_the_list_is_in_order_and_comes_in_pages(office: Office) -> None:
    for number in (3, 1, 2):
        office.have(f"page-{number}", 27)

    def names(**query: Any) -> tuple[list[str], str | None]:
        reply = office.client.get("/adapters", params=query).json()
        return [row["name"] for row in reply["adapters"]], reply["next"]

    assert names(prefix="page-") == (["page-1", "page-2", "page-3"], None)
    assert names(prefix="page-", limit=2) == (["page-1", "page-2"], "page-2")
    assert names(prefix="page-", limit=2, after="page-2") == (["page-3"], None)
    assert names(prefix="nobody") == ([], None)
    everything, _ = names()
    assert everything == sorted(everything)
    refusal(office.client.get("/adapters?limit=0"), 400)


def test_a_caller_sees_only_the_adapters_it_may_use(office: Office) -> None:
    office.have("open-1", 28)
    office.have("secret", 29)
    office.client.put("/adapters/open-2/alias", json={"adapter": "secret"}).raise_for_status()
    rows = office.client.get("/adapters", headers=GUEST).json()["adapters"]
    assert [row["name"] for row in rows] == ["open-1", "open-2"]
    assert {(row["num_using"], row["last_used"], row["num_requests"]) for row in rows} == {(None, None, None)}, (
        "the use by other callers is hidden"
    )
    hidden = refusal(office.client.get("/adapters/secret", headers=GUEST), 404)
    absent = refusal(office.client.get("/adapters/sacred", headers=GUEST), 404)
    assert hidden["message"].replace("secret", "sacred") == absent["message"]
    detail = office.client.get("/adapters/open-2", headers=GUEST).json()
    assert detail["aliases"] == []
    assert detail["num_requests"] is None
    assert office.client.get("/adapters/open-2").json()["aliases"] == ["secret"]


@pytest.mark.slow
def test_waiting_for_details_takes_no_thread_from_other_requests(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send 60 requests for details: there are 40 threads, and admission needs one of them."""
    office.have("slow", 40)
    may_go_on = threading.Event()

    def read(_: object) -> Details:
        assert may_go_on.wait(LIMIT_S)
        return Details("", details.modules)

    assert office.service.files
    details = office.service.files.details.read(office.service.registry.by_name["slow"])
    monkeypatch.setattr(office.service.files.details, "read", read)
    with ThreadPoolExecutor(60) as pool:
        replies = [
            pool.submit(httpx.get, f"{office.client.base_url}/adapters/slow", timeout=LIMIT_S, headers=ADMIN) for _ in range(60)
        ]
        wait_until(lambda: sum(reply.done() for reply in replies) == 60 - 1 - MAX_WAITING, "refusals")
        assert office.generate("slow")["text"]
        assert office.row("slow")
        may_go_on.set()
        assert Counter(reply.result().status_code for reply in replies) == {200: 1 + MAX_WAITING, 429: 59 - MAX_WAITING}


CHANGES = [
    "POST /adapters",
    "DELETE /adapters/math",
    "PUT /adapters/math/alias",
    "POST /adapters/math/load",
    "POST /adapters/math/unload",
    "POST /adapters/math/pin",
    "POST /adapters/math/unpin",
    "POST /v1/load_lora_adapter",
    "POST /v1/unload_lora_adapter",
]


@pytest.mark.parametrize(("headers", "status"), [({"authorization": ""}, 401), (GUEST, 403)])
@pytest.mark.parametrize("request_line", CHANGES)
def test_only_an_admin_changes_anything(office: Office, request_line: str, headers: dict[str, str], status: int) -> None:
    error = refusal(office.client.request(*request_line.split(), headers=headers, json={}), status)
    assert ("admin" if status == 403 else "key") in error["message"]


BAD_NAMES = [
    "%2e%2e",
    "..%2fmath",
    "%2fetc%2fpasswd",
    ".aliases",
    "math%00",
    "M%C3%A4th",
    "MATH",
    "a" * 65,
    "x" * 4000,
    "math@",
    "math@zz",
    "math@..",
    "%20",
]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("request_line", [line for line in CHANGES if "math" in line] + ["GET /adapters/math"])
def test_an_invalid_adapter_name_changes_nothing(office: Office, request_line: str, name: str) -> None:
    method, path = request_line.split()
    before = sorted(office.store.root.rglob("*"))
    reply = office.client.request(method, path.replace("math", name), json={"adapter": "nobody"})
    assert reply.status_code in (400, 404), reply.text
    refusal(reply, reply.status_code)
    assert sorted(office.store.root.rglob("*")) == before


@pytest.mark.parametrize("reference", ["../secret", "/etc/passwd", "a/b", "secret@..", "", "\0", "x" * 300])
def test_an_alias_cannot_name_a_path(office: Office, reference: str) -> None:
    assert refusal(office.client.put("/adapters/path/alias", json={"adapter": reference}), 400)["param"] == "adapter"


def test_a_body_of_another_kind_is_415(office: Office) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        refusal(office.client.post("/adapters", content=b"x", headers={"content-type": kind}), 415)


def test_the_api_describes_uploads(office: Office) -> None:
    paths = office.client.get("/openapi.json").json()["paths"]
    body = paths["/adapters"]["post"]["requestBody"]["content"]
    assert set(body) == {"multipart/form-data", "application/json"}
    assert {"200", "202"} <= set(paths["/adapters/{name}"]["delete"]["responses"])


def test_a_damaged_folder_is_not_loaded_and_all_its_faults_are_reported(office: Office) -> None:
    write_adapter(office.store.root / "torn", office.base, seed=30)
    (office.store.root / "torn" / WEIGHTS_FILE).write_bytes(b"nothing of the kind")
    config = office.store.root / "torn" / CONFIG_FILE
    config.write_text(config.read_text().replace('"lora_alpha": 8.0', '"lora_alpha": 9.0'))
    reply = office.post("/adapters/torn/load")
    assert reply.status_code == 400
    faults = reply.json()["error"]["faults"]
    assert len(faults) >= 2
    assert any("is not a safetensors file" in fault for fault in faults)
    assert any("its digest is" in fault for fault in faults)
    assert str(office.store.root) not in reply.text
    assert office.ask("torn").status_code == 404
    shutil.rmtree(office.store.root / "torn")
