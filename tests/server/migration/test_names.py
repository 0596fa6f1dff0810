"""Errors for unknown names: they show a tenant only adapters that it may use, and nobody a path."""

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
    """Yield a client of a server. Its tenant acme may use math and names that begin with acme, its tenant other nothing."""
    keys = write_keys(tmp_path_factory.mktemp("keys"), 'adapters = ["math", "acme-*"]', "adapters = []")
    registry = Registry([registered(name, f"{number}" * 64) for number, name in enumerate(NAMES)])
    with served(make_service(tokenizer, keys, registry=registry)) as client:
        yield client


def message(client: httpx.Client, path: str, name: str, key: str) -> str:
    """Return the error message for an unknown name."""
    asked = {"json": BODIES[path](name)} if path in BODIES else {}
    reply = client.request("POST" if asked else "GET", path if asked else f"{path}/{name}", headers=bearer(key), **asked)
    assert reply.status_code == 404, reply.text
    text: str = reply.json()["error"]["message"]
    return text


@pytest.mark.parametrize("path", [*BODIES, "/v1/models"])
@pytest.mark.parametrize(
    "name",
    ["secret-sauce", "Secret-Sauce", "secret-sauces", "secret", "math+secret-sauce", "math,secret-sauce", "secret-sauce:1"],
)
def test_a_hidden_name_is_answered_like_an_unknown_one(client: httpx.Client, path: str, name: str) -> None:
    for key in (ACME, OTHER):
        hidden = message(client, path, name, key)
        unknown_name = name.lower().replace("secret-sauce", "hidden-onion").replace("secret", "hidden")
        unknown = message(client, path, unknown_name, key)
        assert hidden.lower().replace("secret-sauce", "hidden-onion").replace("secret", "hidden") == unknown.lower()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models"])
def test_each_tenant_sees_only_its_own_names(client: httpx.Client, path: str) -> None:
    assert message(client, path, "zzz", ACME).endswith("There are the base model 'fake' and the adapters 'acme-bills', 'math'.")
    assert message(client, path, "zzz", OTHER).endswith("There are the base model 'fake' alone.")
    assert message(client, path, "acme-bill", ACME).endswith("Did you mean 'acme-bills'?")
    assert "acme" not in message(client, path, "acm-bill", OTHER)
    assert "'secret-sauce'" in message(client, path, "zzz", ADMIN)


def test_no_answer_shows_the_path_of_a_model_s_folder(tokenizer: PreTrainedTokenizerFast) -> None:
    service = make_service(tokenizer)
    service.base_names |= {"/srv/models/fake"}
    with served(service) as client:
        reply = client.post("/v1/completions", json={"prompt": "x", "model": "/srv/models/fake"})
        assert reply.status_code == 200
        for name in ("/srv/models/fak", "/srv/models", "zzz"):
            text = client.post("/v1/completions", json={"prompt": "x", "model": name}).json()["error"]["message"]
            assert "/srv/models/fake" not in text
