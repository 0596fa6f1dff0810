"""Names that are none: no tenant is told of adapters that it may not use, and nobody of paths."""

from collections.abc import Iterator

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from server.engine.adapters.registry import Registry
from tests.server.keyed import ACME, ADMIN, OTHER, bearer, make_service, served, write_keys
from tests.server.registered import registered

NAMES = ("math", "secret-sauce", "acme-bills")
BODIES = {
    "/v1/completions": lambda name: {"prompt": "x", "model": name},
    "/v1/chat/completions": lambda name: {"messages": [{"role": "user", "content": "x"}], "model": name},
    "/generate": lambda name: {"prompt": "x", "adapter": name},
    "/tokenize": lambda name: {"prompt": "x", "model": name},
}


@pytest.fixture(scope="module")
def client(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server whose tenant acme may use math and what begins with acme, and whose tenant other may use nothing."""
    keys = write_keys(tmp_path_factory.mktemp("keys"), 'adapters = ["math", "acme-*"]', "adapters = []")
    registry = Registry([registered(name, f"{number}" * 64) for number, name in enumerate(NAMES)])
    with served(make_service(tokenizer, keys, registry=registry)) as client:
        yield client


def message(client: httpx.Client, path: str, name: str, key: str) -> str:
    """Returns what is said of a name that is none."""
    asked = {"json": BODIES[path](name)} if path in BODIES else {}
    reply = client.request("POST" if asked else "GET", path if asked else f"{path}/{name}", headers=bearer(key), **asked)
    assert reply.status_code == 404, reply.text
    said: str = reply.json()["error"]["message"]
    return said


@pytest.mark.parametrize("path", [*BODIES, "/v1/models"])
@pytest.mark.parametrize(
    "name",
    ["secret-sauce", "Secret-Sauce", "secret-sauces", "secret", "math+secret-sauce", "math,secret-sauce", "secret-sauce:1"],
)
def test_what_is_hidden_is_answered_as_what_is_not_there(client: httpx.Client, path: str, name: str) -> None:
    for key in (ACME, OTHER):
        said = message(client, path, name, key)
        never = name.lower().replace("secret-sauce", "hidden-onion").replace("secret", "hidden")
        there = message(client, path, never, key)
        assert said.lower().replace("secret-sauce", "hidden-onion").replace("secret", "hidden") == there.lower()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models"])
def test_each_tenant_is_told_its_own(client: httpx.Client, path: str) -> None:
    assert message(client, path, "zzz", ACME).endswith("There are the base model 'fake' and the adapters 'acme-bills', 'math'.")
    assert message(client, path, "zzz", OTHER).endswith("There are the base model 'fake' alone.")
    assert message(client, path, "acme-bill", ACME).endswith("Did you mean 'acme-bills'?")
    assert "acme" not in message(client, path, "acm-bill", OTHER)
    assert "'secret-sauce'" in message(client, path, "zzz", ADMIN)


def test_a_folder_s_path_is_a_name_that_no_answer_tells(tokenizer: PreTrainedTokenizerFast) -> None:
    service = make_service(tokenizer)
    service.base_names |= {"/srv/models/fake"}
    with served(service) as client:
        reply = client.post("/v1/completions", json={"prompt": "x", "model": "/srv/models/fake"})
        assert reply.status_code == 200
        for name in ("/srv/models/fak", "/srv/models", "zzz"):
            said = client.post("/v1/completions", json={"prompt": "x", "model": name}).json()["error"]["message"]
            assert "/srv/models/fake" not in said
