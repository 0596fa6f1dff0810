"""Uploads and changes of adapters that are refused: the answer says what to do instead."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lori.base_model import BaseModel, load_base_model
from lori.format import PICKLE_FILE, WEIGHTS_FILE
from tests.server.live import Live
from tests.server.office import Office, open_office
from tests.server.peft_folders import ADAPTERS, write_lora


@pytest.fixture(scope="module")
def office(writer_model: Path, writer: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    with open_office(writer_model, writer, tmp_path_factory.mktemp("office")) as office:
        yield office


@pytest.mark.parametrize(
    ("name", "status", "advice"),
    [
        ("lora", 409, "put it there (`python -m lori import` does), and start the server again"),
        ("dora", 400, "use_dora is True"),
        ("ia3", 400, ADAPTERS["ia3"]),
        ("prompt", 400, ADAPTERS["prompt"]),
        ("foreign", 400, ADAPTERS["foreign"]),
    ],
)
def test_a_refused_upload_is_answered_with_advice(office: Office, store: Path, name: str, status: int, advice: str) -> None:
    reply = office.upload(name, store / name)
    assert reply.status_code == status, reply.text
    assert advice in reply.json()["error"]["message"]
    assert office.ask(name).status_code == 404


def test_an_upload_for_another_base_is_one_line_with_the_flag(office: Office, other_model: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", load_base_model(str(other_model), torch.float32))
    error = office.upload("lora", lora).json()["error"]
    assert error["faults"] == ["it was trained on the base own/llama, and does not fit tiny-writer: pass --model own/llama"]


def test_a_pickle_that_is_sent_as_safetensors_is_called_a_pickle(office: Office, store: Path) -> None:
    content = (store / "pickled" / PICKLE_FILE).read_bytes()
    for folder in (store / "lora", store / "calm"):
        error = office.upload("pickled", folder, weights=content).json()["error"]
        assert f"{WEIGHTS_FILE} is not a safetensors file: it is a pickle" in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/adapters", {"hub_id": "own/math"}),
        ("PUT", "/adapters/prod/alias", {"adapter": "calm"}),
        ("DELETE", "/adapters/calm", None),
        ("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "calm"}),
    ],
)
def test_a_change_of_adapters_without_keys_is_answered_with_the_way_to_make_one(
    served: Live, method: str, path: str, body: object
) -> None:
    reply = served.client.request(method, path, json=body)
    assert reply.status_code == 403
    message = reply.json()["error"]["message"]
    assert "`python -m server.keys keys.toml --role admin`" in message
    assert "--keys keys.toml" in message
