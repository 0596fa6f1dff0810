"""Sources of adapters: folders, and a hub. The tests run a small hub on the loopback interface."""

import hashlib
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

from lori.errors import AdapterError, ModelError, UnreachableError
from lori.store.hub import check_model, resolve

COMMIT = "c0ffee" + "0" * 34
FILES = {
    "adapter_config.json": b'{"peft_type": "LORA"}',
    "adapter_model.safetensors": b"weights",
    "README.md": b"# card",
    "lori.json": b'{"templates": ["plain"]}',
    "adapter_model.bin": b"a pickle",
    "sub/adapter_config.json": b"{}",
    "tokenizer.json": b"{}",
}


@dataclass
class Hub:
    """Repositories by id, and the paths of the requests."""

    repos: dict[str, dict[str, bytes]]
    errors: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Status and the hub's error code, by repository."""
    requested: list[str] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    """Handler of the few requests of a download."""

    hub: Hub

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requested.append(path)
        status, code, content = self._find(path.strip("/").split("/"))
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def _find(self, parts: list[str]) -> tuple[int, str, bytes]:
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if repo in self.hub.errors:
            return *self.hub.errors[repo], b""
        files = self.hub.repos.get(repo)
        if files is None:
            return 404, "RepoNotFound", b""
        if parts[0] != "api":
            return 200, "", files["/".join(parts[4:])]
        if parts[5] not in ("main", "v1", COMMIT):
            return 404, "RevisionNotFound", b""
        if parts[4] == "revision":
            return 200, "", json.dumps({"id": repo, "sha": COMMIT}).encode()
        tree = [{"type": "file", "path": path, "size": len(content), "oid": "0"} for path, content in files.items()]
        return 200, "", json.dumps(tree).encode()

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Yield a hub with one adapter, `own/math`, and an empty cache."""
    hub = Hub({"own/math": FILES, "own/model": {"config.json": b"{}"}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    point_at(monkeypatch, f"http://127.0.0.1:{server.server_address[1]}", tmp_path)
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


def point_at(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path) -> None:
    """Set the hub's address and cache, as HF_ENDPOINT and HF_HUB_CACHE do before the library is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Set the address of a hub on a port without a listener."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    point_at(monkeypatch, f"http://127.0.0.1:{port}", tmp_path)


def test_a_folder_resolves_to_itself(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path


def test_a_lone_pickle_is_named_and_not_fetched(hub: Hub) -> None:
    hub.repos["own/pickled"] = {name: content for name, content in FILES.items() if name != "adapter_model.safetensors"}
    with pytest.raises(AdapterError, match=r"hf://own/pickled cannot be imported: .* is a pickle"):
        resolve("hf://own/pickled")
    assert not any(path.endswith(".bin") for path in hub.requested)


@pytest.mark.parametrize("source", ["nowhere/at/all", "https://huggingface.co/own/math", "own/math", ""])
def test_a_missing_folder_is_refused_with_the_accepted_forms(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError, match=r"hf://owner/name\[@revision\]") as caught:
        resolve(source)
    assert repr(source) in str(caught.value)


@pytest.mark.parametrize("source", ["hf://own/math", "hf://own/math@main", "hf://own/math@v1", f"hf://own/math@{COMMIT}"])
def test_an_adapter_is_fetched_without_any_pickle(hub: Hub, source: str) -> None:
    folder = resolve(source)
    contents = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    wanted = {"adapter_config.json", "adapter_model.safetensors", "README.md", "lori.json"}
    assert contents == {name: FILES[name] for name in wanted}
    assert not any(path.endswith((".bin", "tokenizer.json")) for path in hub.requested)


def test_a_fetched_adapter_is_found_again_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve("hf://own/math")
    num_requests = len(hub.requested)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("hf://own/math") == folder
    assert len(hub.requested) == num_requests


@pytest.mark.parametrize(
    "source",
    ["", "math", "own/math/sub", "own/math@", "own/math@a@b", "own/math@../x", "own/ma th", "-own/math", "/math"],
)
def test_a_malformed_id_is_refused_without_a_request(hub: Hub, source: str) -> None:
    with pytest.raises(AdapterError, match="malformed") as caught:
        resolve(f"hf://{source}")
    assert repr(f"hf://{source}") in str(caught.value)
    assert hub.requested == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf://own/unknown", "the hub has no own/unknown"),
        ("hf://own/math@v9", "own/math has no revision 'v9'"),
        ("hf://own/gated", "hf://own/gated is gated"),
        (f"hf://own/gated@{COMMIT}", f"hf://own/gated@{COMMIT} is gated"),
        ("hf://own/model", "hf://own/model is not an adapter: it has no adapter_config.json"),
        ("hf://own/broken", "the hub cannot be reached for own/broken"),
        (f"hf://own/broken@{COMMIT}", f"hf://own/broken@{COMMIT} cannot be fetched"),
    ],
)
def test_a_refusal_of_the_hub_is_reported(hub: Hub, source: str, expected: str) -> None:
    hub.errors |= {"own/gated": (403, "GatedRepo"), "own/broken": (500, "")}
    with pytest.raises(AdapterError) as caught:
        resolve(source)
    assert str(caught.value).startswith(expected)


@pytest.mark.usefixtures("closed")
@pytest.mark.parametrize("source", ["hf://own/math", f"hf://own/math@{COMMIT}"])
@pytest.mark.parametrize("is_offline", [False, True], ids=["nobody listens", "HF_HUB_OFFLINE"])
def test_without_a_network_the_error_has_a_remedy(source: str, is_offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
    with pytest.raises(UnreachableError, match=r"the hub cannot be reached for own/math: connect .* or download it elsewhere"):
        resolve(source)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("own/modle", None, "'own/modle': there is no such folder, and the hub has no such model"),
        ("own/model", (403, "GatedRepo"), "'own/model': it is gated"),
        ("own/model", (404, "EntryNotFound"), "'own/model': the hub's has no config.json"),
        ("own/model/sub", None, "'own/model/sub': there is no such folder, and it is no hub id"),
    ],
)
def test_a_missing_model_is_reported_after_one_request(
    hub: Hub, name: str, error: tuple[int, str] | None, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.errors |= {name: error} if error else {}
    with pytest.raises(ModelError, match=message):
        check_model(name)
    assert len(hub.requested) <= 1
    assert capfd.readouterr() == ("", "")


def test_an_existing_or_fetched_model_is_left_to_the_loader(hub: Hub, tmp_path: Path) -> None:
    check_model("own/model")
    hub.errors["own/model"] = (503, "")
    check_model("own/model")
    assert len(hub.requested) == 2
    snapshot = tmp_path / "cache" / "models--own--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (refs := snapshot.parents[1] / "refs").mkdir()
    (refs / "main").write_text(COMMIT)
    check_model("own/model")
    assert len(hub.requested) == 2


@pytest.mark.usefixtures("closed")
def test_a_model_of_an_unreachable_hub_is_reported_at_once(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for is_offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
        with pytest.raises(ModelError, match=r"'own/model': .* was not fetched before, and the hub cannot be reached"):
            check_model("own/model")
    assert capfd.readouterr() == ("", "")
