"""vLLM's routes for LoRA adapters, with its bodies, texts and statuses. Paths are refused and never read."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lori.base_model import BaseModel
from tests.server.office import Office, open_office
from tests.server.replies import refusal

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def office(writer_model: Path, writer: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    with open_office(writer_model, writer, tmp_path_factory.mktemp("vllm"), max_rank=4, hub=True) as opened:
        yield opened


def test_an_adapter_of_the_store_is_loaded_and_unloaded(office: Office) -> None:
    adapter = office.have("math", 1)
    office.post("/adapters/math/unload")
    reply = office.post(LOAD, lora_name="math", lora_path="math")
    assert reply.status_code == 200
    assert reply.text == "Success: LoRA adapter 'math' added successfully."
    assert office.generate("math")["adapter"][0]["version"] == adapter.version
    reply = office.post(UNLOAD, lora_name="math", lora_int_id=1)
    assert reply.status_code == 200
    assert reply.text == "Success: LoRA adapter 'math' removed successfully."
    assert office.ask("math").status_code == 404
    assert office.store.find("math").version == adapter.version, "its files stay"


def test_an_existing_name_is_replaced_only_with_load_inplace(office: Office) -> None:
    old, new = office.have("placed", 2), office.have("placed", 3)
    error = refusal(office.post(LOAD, lora_name="placed", lora_path=f"placed@{old.version}"), 400)
    assert error["message"] == (
        "The lora adapter 'placed' has already been loaded. If you want to load the adapter in place, set 'load_inplace' to True."
    )
    assert error["type"] == "InvalidUserInput"
    reply = office.post(LOAD, lora_name="placed", lora_path=f"placed@{old.version}", load_inplace=True, is_3d_lora_weight=False)
    assert reply.status_code == 200
    assert office.generate("placed")["adapter"][0]["version"] == old.version
    assert office.store.find("placed").version == new.version, "the store is not changed"


def test_another_name_refers_to_an_adapter_until_the_server_ends(office: Office) -> None:
    adapter = office.have("source", 4)
    assert office.post(LOAD, lora_name="called", lora_path="source").status_code == 200
    assert office.generate("called")["adapter"] == [
        {"name": "called", "version": adapter.version, "weight": 1.0, "policy": False}
    ]
    assert "called" not in office.store.alias_names()
    assert "'called' means source@" in refusal(office.client.delete("/adapters/source"), 409)["message"]
    assert office.post(UNLOAD, lora_name="called").status_code == 200
    assert office.generate("source")["text"]
    assert office.client.delete("/adapters/source").status_code == 200


def test_the_name_of_another_adapter_cannot_be_taken(office: Office) -> None:
    office.have("safety", 5)
    office.have("other", 6)
    office.post("/adapters/safety/unload")
    assert "'safety' is another adapter" in refusal(office.post(LOAD, lora_name="safety", lora_path="other"), 409)["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"lora_name": "", "lora_path": "x"}, "Both 'lora_name' and 'lora_path' must be provided."),
        ({"lora_name": "x", "lora_path": ""}, "Both 'lora_name' and 'lora_path' must be provided."),
    ],
)
def test_an_empty_field_is_refused_in_vllm_s_words(office: Office, body: dict[str, str], message: str) -> None:
    error = refusal(office.client.post(LOAD, json=body), 400)
    assert (error["message"], error["type"]) == (message, "InvalidUserInput")


def test_an_unknown_adapter_is_404_in_vllm_s_words(office: Office) -> None:
    error = refusal(office.post(LOAD, lora_name="x", lora_path="nobody"), 404)
    assert (error["message"], error["type"]) == ("Loading lora x failed: No adapter found for nobody", "NotFoundError")
    error = refusal(office.post(UNLOAD, lora_name="nobody"), 404)
    assert (error["message"], error["type"]) == ("The lora adapter 'nobody' cannot be found.", "NotFoundError")
    error = refusal(office.post(UNLOAD, lora_name=""), 400)
    assert error["message"] == "'lora_name' needs to be provided to unload a LoRA adapter."


PATHS = [
    *("/etc/passwd", "./math", "../math", "~/math", "adapters/../math", "a/b/c", "file:///etc", "C:\\x", "s3://a/b"),
    *("hf://../x", "hf://own/math@../x", "math\0", "Math", "math@../x"),
]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_refused_unread(office: Office, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("nothing is read")

    assert office.service.files
    for method in ("read", "publish", "fetch"):
        monkeypatch.setattr(office.service.files, method, read)
    error = refusal(office.post(LOAD, lora_name="x", lora_path=path), 400)
    assert error["param"] == "lora_path"


@pytest.mark.parametrize("name", ["../x", "/x", "X", "a" * 65, "x@123"])
def test_a_name_that_is_a_path_is_refused(office: Office, name: str) -> None:
    assert refusal(office.post(LOAD, lora_name=name, lora_path="math"), 400)["param"] == "lora_name"


@pytest.mark.parametrize(
    "body",
    [
        {"lora_name": "x"}, {"lora_path": "x"}, {}, {"lora_name": "x", "lora_path": "math", "path": "/etc"},
        {"lora_name": "x", "lora_path": "math", "is_3d_lora_weight": True}, {"lora_name": 3, "lora_path": "x"},
    ],
)  # fmt: skip
def test_a_body_that_is_not_vllms_is_400(office: Office, body: dict[str, object]) -> None:
    refusal(office.client.post(LOAD, json=body), 400)


@pytest.mark.parametrize("path", ["hf://own/math@main", "own/math@main"])
def test_an_adapter_on_the_hub_is_loaded_and_stored(office: Office, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fetch(source: str) -> Path:
        asked.append(source)
        return office.draft("hub", 7)

    assert office.service.files
    monkeypatch.setattr(office.service.files, "_fetch", fetch)
    assert office.post(LOAD, lora_name="from-hub", lora_path=path, load_inplace=True).status_code == 200
    assert asked == ["hf://own/math@main"]
    assert office.generate("from-hub")["adapter"][0]["version"] == office.store.find("from-hub").version
    refusal(office.post(LOAD, lora_name="from-hub", lora_path=path), 400)
    assert len(asked) == 1, "without load_inplace, an existing adapter is not fetched again"
