"""Damaged adapters in a store: the sound ones are served, and a request for a damaged one is answered with its faults."""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lori.base_model import BaseModel
from lori.basis import Explicit
from lori.config import CONFIG_FILE, basis_config, seal_config
from lori.errors import MAX_CHARACTERS, MAX_SHOWN, AdapterFormatError
from lori.format import CARD_FILE, WEIGHTS_FILE, load_adapter, read_config, save_adapter
from lori.store.aliases import ALIASES_FOLDER
from lori.store.bases import BASES_FOLDER
from lori.store.store import AdapterStore
from server.access.key_ring import KeyRing
from server.access.keys import KeyFileError
from server.catalog.inventory import take_inventory
from server.engine.adapters.registry import Faulty
from server.loading import load_service
from server.settings import Settings
from tests.server.forked import start_forked
from tests.server.keyed import ACME, ADMIN, OTHER, bearer, write_keys
from tests.server.live import Live
from tests.server.office import Office, open_office
from tests.server.rig import write_adapter

SECRET = "lori_the-admin-s-key"
SOUND = {"calm", "dry", "ever", "fair"}
FAULTS = {
    "cut": f"{CONFIG_FILE}: JSON: Invalid JSON: EOF",
    "foreign": "trained on the base",
    "linked": f"{CARD_FILE} cannot be read: it is a link, and a store follows none",
    "peft": "it is a PEFT LoRA: `python -m lori import ",
    "torn": f"{WEIGHTS_FILE} has 999 bytes",
}


def write_store(place: Path, base: BaseModel) -> Path:
    """Write four sound adapters and five that are damaged, each in its own way."""
    place.mkdir()
    for seed, name in enumerate([*sorted(SOUND), *FAULTS]):
        write_adapter(place / name, base, seed=seed, templates=("plain",))
    damage(place)
    return place


def damage(place: Path) -> None:
    config = place / "cut" / CONFIG_FILE
    config.write_bytes(config.read_bytes()[:300])
    (place / "torn" / WEIGHTS_FILE).write_bytes((place / "torn" / WEIGHTS_FILE).read_bytes()[:999])
    foreign = read_config(place / "foreign")
    section = foreign.lori.model_copy(update={"base_digest": "1" * 64})
    (place / "foreign" / CONFIG_FILE).write_bytes(seal_config("x", foreign.model_copy(update={"lori": section}))[1])
    (place.parent / "secret").write_text(SECRET)
    (place / "linked" / CARD_FILE).symlink_to(place.parent / "secret")
    lora = {"peft_type": "LORA", "base_model_name_or_path": "x", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (place / "peft" / CONFIG_FILE).write_text(json.dumps(lora))


@pytest.fixture(scope="module")
def served(writer_model: Path, writer: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Yield a real server with that store. Tenant acme may use some of its adapters, tenant other only a damaged one."""
    place = tmp_path_factory.mktemp("damaged")
    keys = write_keys(place, 'adapters = ["calm", "cut", "t*"]', 'adapters = ["peft"]')
    flags = ["--model", str(writer_model), "--adapters", str(write_store(place / "store", writer)), "--keys", str(keys)]
    with start_forked(place / "log", *flags, "--dtype", "float32", "--threads", "1", "--kv-cache-gib", "0.01") as server:
        yield server


def ask(served: Live, path: str, key: str = ADMIN, **body: Any) -> tuple[int, dict[str, Any]]:
    method = "POST" if body else "GET"
    reply = served.client.request(method, path, json=body or None, headers=bearer(key))
    assert SECRET not in reply.text
    return reply.status_code, reply.json()


@pytest.mark.slow
def test_the_server_starts_serves_four_adapters_and_logs_five_faults(served: Live) -> None:
    """Regression: the server did not start at all, whichever of the five faults there was."""
    lines = [line for line in served.log.read_text().splitlines() if "NOT SERVED" in line]
    assert len(lines) == len(FAULTS)
    for line, (name, fault) in zip(sorted(lines), sorted(FAULTS.items()), strict=True):
        assert f"ERROR server.catalog.inventory: the adapter {name!r} is damaged and NOT SERVED: " in line
        assert f"/store/{name}: " in line
        assert fault in line
    _, document = ask(served, "/adapters")
    assert {row["name"] for row in document["adapters"]} == SOUND
    assert [row["name"] for row in document["faulty"]] == sorted(FAULTS)
    assert all(FAULTS[row["name"]] in "; ".join(row["faults"]) for row in document["faulty"])
    for name in SOUND:
        assert ask(served, "/generate", prompt="x", max_tokens=2, adapter=name)[0] == 200
    text = served.client.get("/metrics", headers=bearer(ADMIN)).text
    assert 'lori:adapters_faulty{engine="0",model_name="tiny-writer"} 5.0' in text
    _, models = ask(served, "/v1/models")
    assert {model["id"] for model in models["data"]} == {"tiny-writer", *SOUND}


@pytest.mark.parametrize(
    ("path", "param", "body"),
    [
        ("/generate", "adapter", {"prompt": "x", "adapter": "NAME"}),
        ("/generate", "adapter", {"prompt": "x", "adapter": ["calm", "NAME"], "stream": True}),
        ("/v1/completions", "model", {"prompt": "x", "model": "NAME"}),
        ("/v1/completions", "model", {"prompt": "x", "model": "calm+NAME"}),
        ("/v1/completions", "adapters", {"prompt": "x", "adapters": ["NAME"]}),
        ("/v1/chat/completions", "model", {"messages": [{"role": "user", "content": "x"}], "model": "NAME"}),
        ("/adapters/NAME", "name", {}),
        ("/v1/models/NAME", "model", {}),
        ("/adapters/compare?names=calm,NAME", "names", {}),
    ],
)
@pytest.mark.parametrize("name", FAULTS)
def test_a_request_for_a_damaged_adapter_is_answered_with_its_faults(
    served: Live, path: str, param: str, body: Any, name: str
) -> None:
    body = json.loads(json.dumps(body).replace("NAME", name))
    status, document = ask(served, path.replace("NAME", name), **body)
    error = document["error"]
    assert (status, error["code"], error["type"], error["param"]) == (500, 500, "AdapterError", param)
    assert f"adapter {name!r} is damaged and cannot be served: " in error["message"]
    assert FAULTS[name] in error["message"]
    assert any(FAULTS[name] in fault for fault in error["faults"])
    assert str(served.log.parent) not in json.dumps(document)


def test_a_damaged_adapter_is_shown_only_to_tenants_that_may_use_its_name(served: Live) -> None:
    assert [row["name"] for row in ask(served, "/adapters", ACME)[1]["faulty"]] == ["cut", "torn"]
    assert ask(served, "/generate", ACME, prompt="x", adapter="cut")[0] == 500
    assert ask(served, "/adapters/torn", ACME)[0] == 500
    for name in ("linked", "peft"):
        assert ask(served, f"/adapters/{name}", ACME)[0] == 404
        status, document = ask(served, "/generate", ACME, prompt="x", adapter=name)
        assert (status, document["error"]["type"]) == (404, "NotFoundError")
        assert ask(served, f"/v1/models/{name}", ACME)[0] == 404
    assert [row["name"] for row in ask(served, "/adapters", OTHER)[1]["faulty"]] == ["peft"]


def test_pages_have_each_damaged_adapter_once(served: Live) -> None:
    names, after = list[str](), ""
    while True:
        _, document = ask(served, f"/adapters?limit=1&after={after}")
        names += [row["name"] for row in document["faulty"]]
        if document["next"] is None:
            break
        after = document["next"]
    assert names == sorted(FAULTS)
    assert [row["name"] for row in ask(served, "/adapters?prefix=t")[1]["faulty"]] == ["torn"]


@pytest.fixture
def office(writer_model: Path, writer: BaseModel, tmp_path: Path) -> Iterator[Office]:
    """Yield a server with that store in this process, whose client is an admin."""
    write_store(tmp_path / "store", writer)
    with open_office(writer_model, writer, tmp_path) as office:
        yield office


def faulty(office: Office) -> dict[str, list[str]]:
    return {row["name"]: row["faults"] for row in office.client.get("/adapters").json()["faulty"]}


def test_a_folder_that_is_mended_on_disk_is_served_when_it_is_loaded(office: Office) -> None:
    (office.store.root / "linked" / CARD_FILE).unlink()
    assert office.ask("linked").status_code == 500
    assert office.post("/adapters/linked/load").status_code == 200
    assert office.generate("linked")["adapter"][0]["name"] == "linked"
    assert "linked" not in faulty(office)
    reply = office.post("/v1/load_lora_adapter", lora_name="calm-too", lora_path="calm")
    assert reply.status_code == 200


def test_a_card_that_becomes_a_link_while_the_server_runs_is_not_shown(office: Office) -> None:
    """Regression: a client could read the key file by such a link."""
    assert office.client.get("/adapters/calm").status_code == 200
    (office.store.root / "calm" / CARD_FILE).symlink_to(office.store.root.parent / "secret")
    for name in ("calm", "dry"):
        reply = office.client.get(f"/adapters/{name}")
        assert SECRET not in reply.text
        assert reply.status_code == (500 if name == "calm" else 200)
    message = office.client.get("/adapters/calm").json()["error"]["message"]
    assert message == f"adapter 'calm' cannot be read: {CARD_FILE} cannot be read: it is a link, and a store follows none"


def test_an_adapter_that_is_still_damaged_is_reported_with_its_new_fault(office: Office) -> None:
    shutil.copy(office.store.root / "calm" / CONFIG_FILE, office.store.root / "cut" / CONFIG_FILE)
    reply = office.post("/adapters/cut/load")
    assert reply.status_code == 400
    [fault] = reply.json()["error"]["faults"]
    assert "content digest is" in fault
    assert faulty(office)["cut"] == [fault]
    assert fault in office.ask("cut").json()["error"]["message"]


def test_a_damaged_adapter_that_is_deleted_can_be_uploaded_anew(office: Office) -> None:
    assert office.upload("torn", office.draft("torn", 9)).status_code == 409, "an author's folder is not overwritten"
    for name in ("torn", "linked"):
        assert office.client.delete(f"/adapters/{name}").status_code == 200
        assert name not in faulty(office)
        assert office.ask(name).status_code == 404
        office.have(name, 9)
        office.generate(name)
    assert (office.store.root.parent / "secret").read_text() == SECRET


@pytest.mark.slow
def test_an_upload_mends_a_version_and_its_aliases(writer_model: Path, writer: BaseModel, tmp_path: Path) -> None:
    with open_office(writer_model, writer, tmp_path) as office:
        version = office.have("math", 1).version
        draft = office.draft("math", 1)
        office.client.put("/adapters/prod/alias", json={"adapter": "math"}).raise_for_status()
    folder = office.store.root / f"math@{version}"
    (folder / CONFIG_FILE).write_text("{")
    with open_office(writer_model, writer, tmp_path) as office:
        assert [*faulty(office)] == ["math", "prod"]
        for reference in ("math", "prod", f"math@{version}", f"prod@{version[:4]}"):
            assert office.ask(reference).status_code == 500
        assert office.ask("math@ffffffffffff").status_code == 404
        assert office.upload("math", draft).status_code == 201
        assert not faulty(office)
        assert office.generate("prod")["text"] == office.generate("math")["text"]


@pytest.mark.slow
def test_another_version_takes_the_place_of_a_damaged_one(writer_model: Path, writer: BaseModel, tmp_path: Path) -> None:
    with open_office(writer_model, writer, tmp_path) as office:
        old, new = office.have("math", 1).version, office.have("math", 2).version
    (office.store.root / f"math@{new}" / WEIGHTS_FILE).write_bytes(b"")
    with open_office(writer_model, writer, tmp_path) as office:
        assert office.ask("math").status_code == 500
        assert office.generate(f"math@{old}")["adapter"][0]["version"] == old, "a sound version is served by its own name"
        office.client.put("/adapters/math/alias", json={"adapter": f"math@{old}"}).raise_for_status()
        assert office.generate("math")["adapter"][0]["version"] == old
        assert "math" not in faulty(office)


def inventory(own: Path | None, demo: Path | None, base: BaseModel, *, is_strict: bool = False) -> Any:
    own_store, demo_store = (AdapterStore(place) if place else None for place in (own, demo))
    return take_inventory(own_store, demo_store, base.identity, is_strict=is_strict)


@pytest.mark.parametrize("damage", ["config", "no config", "link", "alias"])
def test_a_damaged_own_adapter_is_not_replaced_by_the_demo_s(
    writer: BaseModel, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for place in ("own", "demo"):
        (tmp_path / place).mkdir()
        write_adapter(tmp_path / place / "math", writer, seed=1)
    write_adapter(tmp_path / "demo" / "law", writer, seed=2)
    folder = tmp_path / "own" / "math"
    if damage == "config":
        (folder / CONFIG_FILE).write_text("")
    elif damage == "no config":
        (folder / CONFIG_FILE).unlink()
    elif damage == "link":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "nowhere")
    else:
        AdapterStore(tmp_path / "own").publish(folder, "math")
        (tmp_path / "own" / ALIASES_FOLDER / "math").write_text("nothing")
    with caplog.at_level(logging.INFO):
        result = inventory(tmp_path / "own", tmp_path / "demo", writer)
    assert [*result.summaries] == ["law"]
    assert [one.name for one in result.faulty] == ["math"]
    assert "the demo adapter 'math' is not served: --adapters has one of this name" in caplog.text
    assert not any(str(tmp_path) in fault for one in result.faulty for fault in one.faults)


def test_strict_ends_the_start_with_all_faults(writer: BaseModel, tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", writer)
    (store / ALIASES_FOLDER).mkdir()
    (store / ALIASES_FOLDER / "prod").write_text("calm@ffff")
    with pytest.raises(AdapterFormatError) as caught:
        inventory(store, None, writer, is_strict=True)
    for name, fault in FAULTS.items():
        assert any(f"{store}/{name}: " in line and fault in line for line in caught.value.lines)
    assert any("the alias 'prod' means calm@ffff" in line for line in caught.value.lines)


@pytest.mark.slow
def test_a_damaged_alias_shows_a_tenant_no_other_adapter_s_name(writer_model: Path, writer: BaseModel, tmp_path: Path) -> None:
    """Regression: the tenant was shown the alias's target or the content of its file. The log has these in full."""
    store, keys = write_store(tmp_path / "store", writer), write_keys(tmp_path, 'adapters = ["pub*"]')
    held = {"pub-broken": "hidden adapter", "pub-gone": "hidden@aaaaaaaaaaaa", "pub-linked": "hidden@bbbbbbbbbbbb"}
    (store / ALIASES_FOLDER).mkdir()
    for name, content in held.items():
        (store / ALIASES_FOLDER / name).write_text(content)
    shutil.copytree(store / "calm", tmp_path / "elsewhere")
    (store / "hidden@bbbbbbbbbbbb").symlink_to(tmp_path / "elsewhere")
    flags = ["--model", str(writer_model), "--adapters", str(store), "--keys", str(keys), "--dtype", "float32"]
    with start_forked(tmp_path / "log", *flags, "--threads", "1", "--kv-cache-gib", "0.01") as server:
        reply = server.client.get("/adapters", headers=bearer(ACME))
        assert {row["name"]: row["faults"] for row in reply.json()["faulty"]} == {
            "pub-broken": ["the alias cannot be read"],
            "pub-gone": ["the alias means an adapter that is not there"],
            "pub-linked": ["the alias means an adapter that is not there"],
        }
        texts = [reply.text]
        for name in held:
            reply = server.client.post("/generate", json={"prompt": "x", "adapter": name}, headers=bearer(ACME))
            assert reply.status_code == 500
            texts.append(reply.text)
        assert not any("hidden" in text for text in texts)
        log = server.log.read_text()
        assert all(content in log for content in held.values())


@pytest.mark.slow
def test_a_missing_basis_is_a_fault_of_its_adapters_alone(writer: BaseModel, tmp_path: Path, writer_model: Path) -> None:
    """Regression: a missing basis ended the start, after the configs were found sound."""
    write_adapter(tmp_path / "store" / "calm", writer, seed=1)
    calm = load_adapter(tmp_path / "store" / "calm")
    a = {name: calm.basis.draw(name, b.shape[1], writer.identity.shapes[name][1]) for name, b in calm.modules.items()}
    basis = Explicit.from_tensors(a)
    section = calm.config.lori.model_copy(update={"basis": basis_config(basis)})
    save_adapter(replace(calm, config=calm.config.model_copy(update={"lori": section}), basis=basis), tmp_path / "store" / "own")
    service = load_service(Settings(model=str(writer_model), adapters=str(tmp_path / "store"), dtype="float32"))
    assert {*service.registry.by_name} == {"calm", "own"}
    shutil.rmtree(tmp_path / "store" / BASES_FOLDER)
    service = load_service(Settings(model=str(writer_model), adapters=str(tmp_path / "store"), dtype="float32"))
    assert [*service.registry.by_name] == ["calm"]
    assert "its basis cannot be read" in service.registry.faulty["own"].faults[0]


@pytest.mark.slow
def test_a_policy_that_names_a_damaged_adapter_stops_the_start_and_a_reload(
    writer_model: Path, writer: BaseModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, keys = write_store(tmp_path / "store", writer), write_keys(tmp_path, "policy = { torn = 0.5 }")
    settings = Settings(model=str(writer_model), adapters=str(store), dtype="float32", keys=keys)
    with pytest.raises(KeyFileError, match=r"tenants.acme.policy: adapter 'torn' is damaged and cannot be served: .*999 bytes"):
        load_service(settings)
    write_keys(tmp_path, "policy = { calm = 0.5 }")
    service = load_service(settings)
    assert isinstance(service.keys, KeyRing)
    write_keys(tmp_path, "policy = { torn = 0.25 }")
    service.keys.poll()
    service.keys.poll()  # the second poll finds the same content, and accepts it
    assert "THE KEYS FROM BEFORE STAY" in caplog.text
    assert dict(service.keys.keys.tenants["acme"].policy) == {"calm": 0.5}


def test_many_long_faults_are_shortened_and_none_forges_a_line() -> None:
    adapter = Faulty.from_faults("a\nb", "", [f"{number}\n\x1b[2J{'x' * 999}" for number in range(99)])
    assert adapter.reference == r"a\nb"
    assert len(adapter.faults) == MAX_SHOWN + 1
    assert adapter.faults[-1] == f"and {99 - MAX_SHOWN} more"
    assert all(fault.isprintable() and len(fault) <= MAX_CHARACTERS for fault in adapter.faults)
