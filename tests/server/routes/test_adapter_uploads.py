"""Uploads and fetches from the hub: each is accepted whole or refused whole, within the limits on its size."""

import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lori.adapter import Adapter
from lori.base_model import BaseModel
from lori.basis import Explicit
from lori.config import CONFIG_FILE, basis_config, seal_config
from lori.errors import MAX_CHARACTERS, MAX_SHOWN, AdapterError, UnreachableError
from lori.format import WEIGHTS_FILE, read_config, save_adapter
from lori.peft.exporter import export_peft
from lori.store.locks import LOCKS_FOLDER
from lori.store.store import AdapterStore
from tests.server.live import LIMIT_S
from tests.server.office import ADMIN, GUEST, Office, open_office
from tests.server.replies import refusal

MAX_UPLOAD = 1 << 20
MAX_BODY = 4096


@pytest.fixture(scope="module")
def office(writer_model: Path, writer: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    """Yield a server for adapters of rank 6 at most that may fetch from the hub."""
    place = tmp_path_factory.mktemp("uploads")
    settings = {"max_rank": 6, "max_upload_bytes": MAX_UPLOAD, "max_body_bytes": MAX_BODY, "hub": True}
    with open_office(writer_model, writer, place, **settings) as opened:
        yield opened


@pytest.fixture
def unchanged(office: Office) -> Iterator[None]:
    """Assert that a test leaves the store and the list of adapters as they were."""

    def state() -> tuple[Any, ...]:
        # Hidden files, such as temporary ones, are listed too. The file of a released lock may stay.
        files = {path for path in office.store.root.rglob("*") if path.parent.name != LOCKS_FOLDER}
        return [*office.store.list()], office.client.get("/adapters").json(), files - {office.store.root / LOCKS_FOLDER}

    before = state()
    yield
    assert state() == before


def changed(folder: Path, **section: Any) -> bytes:
    """Return the config of an adapter with changed fields, sealed so that it is sound by itself."""
    config = read_config(folder)
    lori = config.lori.model_copy(update={key: value for key, value in section.items() if key != "r"})
    _, content = seal_config("x", config.model_copy(update={"lori": lori} | ({"r": section["r"]} if "r" in section else {})))
    return content


@pytest.mark.usefixtures("unchanged")
def test_a_form_with_missing_or_unknown_fields_is_refused(office: Office) -> None:
    folder = office.draft("form", 1)
    files = {"config": (folder / CONFIG_FILE).read_bytes(), "weights": (folder / WEIGHTS_FILE).read_bytes()}
    for field in ("name", "config", "weights"):
        error = refusal(office.send({"name": "form"} | files | {field: None}), 400)
        assert (error["param"], error["message"]) == (field, f"{field}: is missing")
    for fields, param, message in (
        ({"path": "/etc/passwd"}, "path", "unknown field"),
        ({"adapter_config.json": b"{}"}, "adapter_config.json", "unknown field"),
        ({"": "x"}, "", "unknown field"),
        ({"name": "x" * 1025}, "name", "has more than 1024 bytes"),
        ({"card": bytes(1 << 20)}, None, "longer than"),
    ):
        reply = office.send({"name": "form"} | files | fields)
        error = refusal(reply, 413 if param is None else 400)
        assert message in error["message"]
        assert error["param"] == param
    twice = [("config", ("c", b"{}")), ("config", ("c", b"{}")), ("weights", ("w", b""))]
    error = refusal(office.client.post("/adapters", data={"name": "form"}, files=twice), 400)
    assert error["message"] == "config: is there twice"


@pytest.mark.parametrize(
    "name", ["../form", "/form", "a/b", "..", "Form", "form@123", "", " form", "f" * 65, "f" * 100_000, "for\0m", "fôrm"]
)
@pytest.mark.usefixtures("unchanged")
def test_a_name_that_is_a_path_is_refused(office: Office, name: str) -> None:
    error = refusal(office.upload(name, office.draft("form", 1)), 400)
    assert error["param"] == "name"
    assert len(error["message"]) < 1000


def test_the_file_names_in_a_form_are_ignored(office: Office) -> None:
    """Upload files that `Office.send` names `../field`."""
    office.have("traversal", 2)
    assert {path.name for path in office.store.find("traversal").folder.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
    assert not (office.store.root.parent / "config").exists()


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"", "multipart/form-data"),
        (b"", "multipart/form-data; boundary=b"),
        (b"--b--", "multipart/form-data; boundary=b"),
        (b"--b", "multipart/form-data; boundary=" + "b" * 1000),
        (b"x", "multipart/form-data; boundary=b"),
        (b"--b\r\n\r\nx", "multipart/form-data; boundary=b"),
        (b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n", "multipart/form-data; boundary=b"),
        (b'--b\r\nContent-Disposition: form-data; name="config"; filename="x"\r\n\r\n{}', "multipart/form-data; boundary=b"),
        (b"{", "application/json"),
        (b'{"hub_id": "a/b", "path": "/etc"}', "application/json"),
        (b'{"hub_id": "/etc/passwd"}', "application/json"),
        (b'{"hub_id": "../x"}', "application/json"),
        (b'{"hub_id": "a/b/c"}', "application/json"),
        (b'{"hub_id": "a/b", "revision": "../x"}', "application/json"),
        (b'{"hub_id": "a/b", "name": "../x"}', "application/json"),
        (b'{"hub_id": 3}', "application/json"),
        (b"[]", "application/json"),
    ],
)
@pytest.mark.usefixtures("unchanged")
def test_a_malformed_body_is_refused(office: Office, body: bytes, content_type: str) -> None:
    refusal(office.client.post("/adapters", content=body, headers={"content-type": content_type}), 400)


@pytest.mark.usefixtures("unchanged")
def test_a_file_with_very_many_faults_is_refused_in_few_words(office: Office, caplog: pytest.LogCaptureFixture) -> None:
    """Regression: the answer had 38 MB."""
    folder = office.draft("many", 3)
    config = json.loads((folder / CONFIG_FILE).read_bytes())
    for more in ({f"field-{i}": i for i in range(20_000)}, {"x" * 500_000: 1}, {"base_model_name_or_path": ["x" * 500_000]}):
        reply = office.upload("many", folder, config=json.dumps(config | more).encode())
        assert reply.status_code == 400
        assert len(reply.content) < 40_000
        error = reply.json()["error"]
        assert len(error["faults"]) <= MAX_SHOWN + 1
        assert max(map(len, error["faults"])) <= MAX_CHARACTERS + 1
        if len(more) > MAX_SHOWN:
            assert re.fullmatch(r"and \d{5} more", error["faults"][-1])
            assert error["message"].endswith(error["faults"][-1])
    assert max((len(record.getMessage()) for record in caplog.records), default=0) < 40_000


HUGE = ("1e400", "-1e400", "1e39", "NaN", "1" + "0" * 30, "1" + "0" * 300, "5e-324", "-1", "9223372036854775808")


@pytest.mark.parametrize("field", ["r", "lora_alpha"])
@pytest.mark.usefixtures("unchanged")
def test_a_number_in_a_config_that_overflows_is_refused(office: Office, field: str) -> None:
    ours, exported = office.draft("huge", 3), office.drafts / f"huge-exported-{field}"
    export_peft(AdapterStore(ours.parent).find(ours.name).load(), exported)
    for folder in (ours, exported):
        content = (folder / CONFIG_FILE).read_bytes()
        for number in HUGE:
            config, count = re.subn(rb'"%s": [-0-9.e]+' % field.encode(), f'"{field}": {number}'.encode(), content)
            assert count == 1
            reply = office.upload("huge", folder, config=config, card=None)
            assert reply.status_code == 400, (folder.name, number, reply.text)


@pytest.mark.usefixtures("unchanged")
def test_a_bad_file_is_refused_with_the_list_of_its_faults(office: Office) -> None:
    folder, other = office.draft("bad", 3), office.draft("bad", 4)
    weights = (other / WEIGHTS_FILE).read_bytes()
    torn = (folder / CONFIG_FILE).read_bytes().replace(b'"lora_alpha": 8.0', b'"lora_alpha": 9.0')
    reply = office.upload("bad", folder, config=torn, weights=weights)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["message"].startswith("bad is not a sound adapter: ")
    assert len(error["faults"]) >= 2
    assert any("content digest is" in fault for fault in error["faults"])
    assert any("it was changed, or is damaged" in fault for fault in error["faults"])
    for changes, message in (
        ({"config": b"{}"}, "base_model_name_or_path"),
        ({"config": b"\xff\xfe"}, "JSON"),
        ({"config": b"[" * 100_000}, "JSON"),
        ({"weights": b"\x80\x04."}, "not a safetensors file"),
        ({"weights": weights[:-10]}, "not a safetensors file"),
        ({"config": b"", "weights": b""}, "JSON"),
        ({"config": changed(folder, base_digest="1" * 64)}, "trained on the base"),
    ):
        refused = office.upload("bad", folder, **changes)
        assert refused.status_code == 400, refused.text
        assert any(message in fault for fault in refused.json()["error"]["faults"]), refused.text
    assert office.ask("bad").status_code == 404


@pytest.mark.usefixtures("unchanged")
def test_a_rank_above_max_rank_is_refused_with_the_flag(office: Office) -> None:
    error = refusal(office.upload("high", office.draft("high", 5, rank=7)), 409)
    assert (
        error["message"] == "'high' cannot be served now: it has rank 7, expected 6 at most: start the server with --max-rank 7"
    )


@pytest.mark.usefixtures("unchanged")
def test_an_impossible_rank_is_refused_before_its_basis_is_drawn(office: Office) -> None:
    """Regression: A was drawn for the adapter before it was refused."""
    folder = office.draft("hostile", 6)
    content = json.loads(changed(folder))
    content["r"] = 4096
    error = refusal(office.upload("hostile", folder, config=json.dumps(content).encode()), 409)
    assert "it has rank 4096" in error["message"]


@pytest.mark.usefixtures("unchanged")
def test_an_unprepared_basis_is_refused(office: Office) -> None:
    error = refusal(office.upload("basis", office.draft("basis", 7, stream=5)), 409)
    assert "it is on the basis (seed 0, stream 5), expected (seed 0, stream 0)" in error["message"]


@pytest.mark.usefixtures("unchanged")
def test_an_adapter_with_its_own_a_is_refused(office: Office) -> None:
    adapter = AdapterStore(office.draft("own", 8).parent).find("own-8").load()
    tensors = {m: adapter.basis.draw(m, 4, adapter.shape_of(m)[1]) * 2 for m in adapter.modules}
    basis = Explicit.from_tensors(tensors)
    shapes = {m: (4, adapter.shape_of(m)[1]) for m in adapter.modules}
    section = adapter.config.lori.model_copy(update={"basis": basis_config(basis), "basis_digest": basis.digest(shapes)})
    config = adapter.config.model_copy(update={"lori": section})
    save_adapter(Adapter("own-a", config, adapter.modules, basis), office.drafts / "own-a")
    assert "its own A" in refusal(office.upload("own", office.drafts / "own-a"), 409)["message"]


def test_our_own_peft_export_is_recognized(office: Office) -> None:
    folder = office.draft("peft", 9)
    adapter = AdapterStore(folder.parent).find(folder.name).load()
    export_peft(adapter, office.drafts / "peft-9-exported")
    reply = office.upload("peft", office.drafts / "peft-9-exported", card=None)
    assert reply.status_code == 201, reply.text
    office.upload("ours", folder).raise_for_status()
    assert office.generate("peft")["text"] == office.generate("ours")["text"]
    wrong = office.upload("wrong", office.drafts / "peft-9-exported", card=None, weights=b"torn")
    assert wrong.status_code == 400
    assert wrong.json()["error"]["message"].startswith("wrong is not a sound adapter: ")


@pytest.mark.usefixtures("unchanged")
def test_an_upload_that_grows_too_long_is_413(office: Office) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="weights"; filename="w"\r\n\r\n'
        for _ in range(5):
            yield b"x" * (MAX_UPLOAD // 4)
        yield b"\r\n--b--\r\n"

    reply = office.client.post("/adapters", content=chunks(), headers={"content-type": "multipart/form-data; boundary=b"})
    assert str(MAX_UPLOAD) in refusal(reply, 413)["message"]


@pytest.mark.usefixtures("unchanged")
def test_a_json_body_has_a_shorter_limit_than_an_upload(office: Office) -> None:
    body = json.dumps({"hub_id": "a/b", "name": "x" * MAX_BODY}).encode()
    reply = office.client.post("/adapters", content=body, headers={"content-type": "application/json"})
    assert str(MAX_BODY) in refusal(reply, 413)["message"]


def head(office: Office, length: int, headers: dict[str, str]) -> socket.socket:
    """Send the headers of an upload of `length` bytes, and no body; return the connection."""
    connection = socket.create_connection((office.client.base_url.host, office.client.base_url.port or 0), timeout=LIMIT_S)
    fields = {"host": "x", "content-type": "multipart/form-data; boundary=b", "content-length": str(length)} | headers
    lines = ["POST /adapters HTTP/1.1", *(f"{key}: {value}" for key, value in fields.items()), "", ""]
    connection.sendall("\r\n".join(lines).encode())
    return connection


@pytest.mark.parametrize(
    ("length", "headers", "status"),
    [(1 << 30, ADMIN, 413), (MAX_UPLOAD + 1, ADMIN, 413), (MAX_UPLOAD, GUEST, 403), (MAX_UPLOAD, {}, 401)],
)
def test_an_upload_that_will_be_refused_is_refused_before_its_body(
    office: Office, length: int, headers: dict[str, str], status: int
) -> None:
    with closing(head(office, length, headers)) as connection:
        assert connection.recv(4096).startswith(f"HTTP/1.1 {status} ".encode())


@pytest.mark.usefixtures("unchanged")
def test_a_client_that_leaves_during_its_upload_leaves_nothing_behind(office: Office, caplog: pytest.LogCaptureFixture) -> None:
    with closing(head(office, 1000, ADMIN)) as connection:
        connection.sendall(b"--b\r\n")
    assert office.client.get("/ready").status_code == 200
    office.have("after", 10)
    office.client.delete("/adapters/after").raise_for_status()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("route", ["/generate", "/adapters/x/load"])
def test_other_routes_keep_their_limit(office: Office, route: str) -> None:
    refusal(office.client.post(route, json={"prompt": "x" * MAX_BODY}), 413)


class Hub:
    """A fake hub with one adapter."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, list[str]()
        self.fault: Exception | None = None

    def fetch(self, source: str) -> Path:
        self.asked.append(source)
        if self.fault:
            raise self.fault
        return self.folder


@pytest.fixture
def hub(office: Office, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(office.draft("hub", 11))
    assert office.service.files
    monkeypatch.setattr(office.service.files, "_fetch", hub.fetch)
    return hub


@pytest.mark.parametrize(
    ("body", "source", "name"),
    [
        ({"hub_id": "Own/Math-2"}, "hf://Own/Math-2", "math-2"),
        ({"hub_id": "own/math", "revision": "refs/pr/1", "name": "mine"}, "hf://own/math@refs/pr/1", "mine"),
    ],
)
def test_an_adapter_comes_from_the_hub(office: Office, hub: Hub, body: dict[str, str], source: str, name: str) -> None:
    reply = office.client.post("/adapters", json=body)
    assert reply.status_code == 201, reply.text
    assert hub.asked == [source]
    assert reply.json()["name"] == name
    assert office.generate(name)["adapter"][0]["version"] == office.store.find(name).version


@pytest.mark.parametrize(
    ("fault", "status"), [(AdapterError("the hub has no own/math"), 400), (UnreachableError("the hub cannot be reached"), 503)]
)
@pytest.mark.usefixtures("unchanged")
def test_a_refusal_of_the_hub_is_reported(office: Office, hub: Hub, fault: Exception, status: int) -> None:
    hub.fault = fault
    assert str(fault) in refusal(office.client.post("/adapters", json={"hub_id": "own/math"}), status)["message"]


@pytest.mark.usefixtures("unchanged")
def test_the_upload_limit_holds_for_the_hub_too(office: Office, hub: Hub) -> None:
    (hub.folder / WEIGHTS_FILE).write_bytes(bytes(MAX_UPLOAD))
    assert str(MAX_UPLOAD) in refusal(office.client.post("/adapters", json={"hub_id": "own/math"}), 400)["message"]


@pytest.mark.usefixtures("unchanged")
def test_a_bad_folder_on_the_hub_is_refused_whole(office: Office, hub: Hub) -> None:
    (hub.folder / WEIGHTS_FILE).unlink()
    reply = office.client.post("/adapters", json={"hub_id": "own/math"})
    assert reply.status_code == 400
    assert reply.json()["error"]["faults"] == [f"{WEIGHTS_FILE} cannot be read: No such file or directory"]


@pytest.mark.slow
def test_nothing_is_fetched_from_the_hub_without_its_flag(writer_model: Path, writer: BaseModel, tmp_path: Path) -> None:
    with open_office(writer_model, writer, tmp_path) as office:
        error = refusal(office.client.post("/adapters", json={"hub_id": "own/math"}), 400)
        assert "start it with --hub" in error["message"]
        error = refusal(office.post("/v1/load_lora_adapter", lora_name="x", lora_path="hf://own/math"), 400)
        assert "--hub" in error["message"]


@pytest.mark.slow
def test_a_server_without_a_store_says_how_to_have_one(writer_model: Path, writer: BaseModel, tmp_path: Path) -> None:
    with open_office(writer_model, writer, tmp_path, has_store=False) as office:
        for reply in (
            office.upload("x", office.draft("x", 1)),
            office.client.put("/adapters/x/alias", json={"adapter": "y"}),
            office.client.delete("/adapters/x"),
            office.post("/adapters/x/load"),
        ):
            assert "--adapters FOLDER" in refusal(reply, 409)["message"]


@pytest.mark.slow
def test_a_store_that_cannot_be_written_is_reported_and_nothing_changes(
    writer_model: Path, writer: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_office(writer_model, writer, tmp_path) as office:
        office.have("math", 1)
        monkeypatch.setattr(os, "access", lambda *_: False)  # permissions do not restrict root
        for reply in (office.upload("math", office.draft("math", 2)), office.client.delete("/adapters/math")):
            assert "may not write" in refusal(reply, 409)["message"]
        monkeypatch.undo()
        (office.store.root / ".locks" / "math").unlink()
        (office.store.root / ".locks" / "math").mkdir()
        for reply in (
            office.upload("math", office.draft("math", 2)),
            office.client.put("/adapters/math/alias", json={"adapter": "math"}),
        ):
            assert reply.status_code in (409, 503), reply.text
            assert str(office.store.root) not in reply.text
        assert office.generate("math")["text"]
        assert len(office.client.get("/adapters/math").json()["versions"]) == 1
