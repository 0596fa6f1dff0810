"""Named merges: a name for adapters with weights, in requests over a socket."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from lori.base_model import load_base_model
from lori.errors import AdapterError
from lori.format import save_adapter
from lori.merge import merge
from lori.named_merge import MergedAdapter, NamedMerge
from lori.store.entry import Entry
from lori.store.store import AdapterStore
from server.engine.generate_request import GenerateRequest, RefusedError
from server.loading import load_service
from server.service.named_merges import NamedMerges
from server.service.service import Service
from server.settings import Settings
from tests.server.keyed import ACME, ADMIN, OTHER, bearer, served, write_keys
from tests.server.live import wait_until
from tests.server.replies import refusal
from tests.server.rig import write_adapter, write_adapters, write_merge

pytestmark = pytest.mark.slow
WEIGHTS = [0.75, -0.25]


def merged_adapters(references: Sequence[str]) -> list[MergedAdapter]:
    return [MergedAdapter(reference=reference, weight=weight) for reference, weight in zip(references, WEIGHTS, strict=True)]


def make_service(
    model: Path, place: Path, name: str = "both", references: tuple[str, ...] = ("math", "safety"), acme: str = ""
) -> Service:
    """Return a service with the merge `name`. The tenant `acme` may use all adapters, `other` all but `safety`."""
    base = load_base_model(str(model), torch.float32, "eager")
    store = write_adapters(place / "adapters", base)
    named = [one if "@" in one else f"{one}@{Entry(one, store / one).version}" for one in references]
    write_merge(place / "merges", name, base.identity.digest, merged_adapters(named), about="by hand")
    return load_service(
        Settings(
            model=str(model),
            adapters=str(store),
            merges=place / "merges",
            keys=write_keys(place, acme, other='adapters = ["math", "intent", "both"]'),
            demo_adapters=False,
            dtype="float32",
            kv_cache_gib=0.05,
        )
    )


@pytest.fixture(scope="module")
def client(writer_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with served(make_service(writer_model, tmp_path_factory.mktemp("merges")), ACME) as client:
        yield client


def ask(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    body = {"prompt": "12 + 3 =", "max_tokens": 8, "temperature": 0} | fields
    reply: dict[str, Any] = client.post("/generate", json=body).raise_for_status().json()
    return reply


def terms(reply: dict[str, Any]) -> list[tuple[str, float]]:
    return [(adapter["name"], adapter["weight"]) for adapter in reply["adapter"]]


def test_a_name_answers_as_its_adapters_with_their_weights(client: httpx.Client) -> None:
    reply, expected = ask(client, adapter="both"), ask(client, adapter=["math", "safety"], weights=WEIGHTS)
    assert terms(reply) == [("math", 0.75), ("safety", -0.25)]
    assert reply["text"] == expected["text"] != ask(client)["text"]


def test_weights_multiply_those_of_the_merge(client: httpx.Client) -> None:
    assert terms(ask(client, adapter="both", weights=[2])) == [("math", 1.5), ("safety", -0.5)]
    reply = ask(client, adapter=["intent", "both"], weights=[1, 0.5])
    assert terms(reply) == [("intent", 1.0), ("math", 0.375), ("safety", -0.125)]


def test_other_forms_of_names_mean_the_merge_too(client: httpx.Client) -> None:
    expected = [("math", 1.5), ("safety", -0.5)]
    assert terms(ask(client, adapter=[{"name": "both", "weight": 2}])) == expected
    for model, more in (("both:2", []), ("both:2+intent:1", [("intent", 1.0)])):
        body = {"model": model, "prompt": ["1", "2"], "max_tokens": 1}
        reply = client.post("/v1/completions", json=body).raise_for_status().json()
        assert all(terms(choice["lori"]) == [*expected, *more] for choice in reply["choices"])


def test_openai_s_routes_take_the_name_as_a_model(client: httpx.Client) -> None:
    body = {"model": "both", "messages": [{"role": "user", "content": "12 + 3 ="}], "max_tokens": 4}
    reply = client.post("/v1/chat/completions", json=body).raise_for_status().json()
    assert reply["model"] == "both"
    assert terms(reply["lori"]) == [("math", 0.75), ("safety", -0.25)]
    body = {"model": "both", "messages": body["messages"]}
    assert client.post("/tokenize", json=body).raise_for_status().json()["template"] == "chat"


def test_models_lists_the_merge(client: httpx.Client) -> None:
    cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert cards["both"] == client.get("/v1/models/both").json()
    root = cards["both"]["root"]
    assert root == f"{cards['math']['root']}:0.75+{cards['safety']['root']}:-0.25"
    reply = client.post("/v1/completions", json={"model": root, "prompt": "1", "max_tokens": 1}).raise_for_status().json()
    assert terms(reply["lori"]) == [("math", 0.75), ("safety", -0.25)]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"adapter": "both", "weights": "auto"}, "weights", "asks for 'auto' with 'both', which has weights of its own"),
        (
            {"adapter": ["intent", "both"], "weights": [1, "auto"]},
            "weights",
            "asks for 'auto' for 'both', which has weights of its own",
        ),
        ({"adapter": "both", "weights": []}, "weights", "has 0 weights, expected 1, one for each name"),
        (
            {"adapter": ["intent", "both"]},
            "weights",
            "'both' is a merge beside other adapters, and needs a weight: expected a number for 'both', and a number or 'auto'",
        ),
        ({"adapter": "both", "merge": "ties"}, "merge", "is 'ties' with 'both', which is a sum; expected 'linear'"),
        ({"adapter": ["both", "intent"]}, "weights", "'both' is a merge beside other adapters"),
        ({"adapter": ["both", "intent"], "weights": [1]}, "weights", "has 1 weights, expected 2, one for each name"),
        (
            {"adapter": ["both", "math"], "weights": [1, 1]},
            "adapter",
            "names 'math' and the merge 'both', which has it, too, expected each adapter once",
        ),
        (
            {"adapter": ["math", "both"], "weights": [1, 0]},
            "adapter",
            "names 'math' and the merge 'both', which has it, too, expected each adapter once",
        ),
        ({"adapter": ["both", "both"], "weights": [1, 1]}, "adapter", "names 'both' twice, expected each adapter once"),
    ],
)
def test_what_does_not_fit_a_merge_is_refused(client: httpx.Client, fields: dict[str, Any], param: str, message: str) -> None:
    error = refusal(client.post("/generate", json={"prompt": "1"} | fields), 400)
    assert error["param"] == param
    assert message in error["message"]


def test_the_limits_of_a_request_hold_for_what_its_merges_mean() -> None:
    adapters = [MergedAdapter(reference=f"many-{number}@0123456789ab", weight=2.0) for number in range(40)]
    merge = NamedMerge(base_digest="b" * 64, adapters=adapters)
    merges = NamedMerges({"many": merge, "more": merge})
    for names, weights, message in (
        (("many", "more"), (1.0, 1.0), "names 80 adapters with those of merges, expected at most 64"),
        (("many",), (16.0,), "gives many-0@0123456789ab the weight 32, expected -16 to 16"),
    ):
        with pytest.raises(RefusedError, match=message):
            merges.resolve(GenerateRequest(prompt="1", adapters=names, weights=weights))


def test_of_two_merges_with_one_adapter_both_are_named(tmp_path: Path, writer_model: Path) -> None:
    service = make_service(writer_model, tmp_path)
    [merge] = service.merges.by_name.values()
    service.merges.by_name = {"both": merge, "also": merge}
    with served(service, ACME) as client:
        error = refusal(client.post("/generate", json={"prompt": "1", "adapter": ["both", "also"], "weights": [1, 1]}), 400)
    assert f"names the merges 'both' and 'also', which both have '{merge.adapters[0].reference}'" in error["message"]


def test_adapters_beside_a_merge_may_have_automatic_weights() -> None:
    adapters = [
        MergedAdapter(reference="math@0123456789ab", weight=1.0, block_weights=[0.5, 1.5]),
        MergedAdapter(reference="law@0123456789ab", weight=-0.5),
    ]
    merges = NamedMerges({"both": NamedMerge(base_digest="b" * 64, adapters=adapters)})
    resolved = merges.resolve(GenerateRequest(prompt="1", adapters=("intent", "both"), weights=("auto", 2.0)))
    assert resolved.adapters == ("intent", "math@0123456789ab", "law@0123456789ab")
    assert resolved.weights == ("auto", 2.0, -1.0)
    assert resolved.block_weights == ((), (0.5, 1.5), ())


def test_models_says_what_a_sum_with_a_merge_means(client: httpx.Client) -> None:
    cards = {card["id"]: card["root"] for card in client.get("/v1/models").json()["data"]}
    root = client.get("/v1/models/both:2+intent:1").raise_for_status().json()["root"]
    assert root.startswith(f"{cards['math']}:1.5+{cards['safety']}:-0.5+intent")
    assert root.endswith(":1")
    for reply in (
        client.get("/v1/models/both+math"),
        client.post("/v1/completions", json={"model": "both+math", "prompt": "1"}),
    ):
        error = refusal(reply, 400)
        assert (error["param"], "model: 'both' is a merge beside other adapters" in error["message"]) == ("model", True)
    assert refusal(client.get("/v1/models/both+both"), 400)["param"] == "model"
    error = refusal(client.get("/v1/models/both:2+intent:auto"), 400)
    assert error["param"] == "model"
    assert "the base has no background" in error["message"]


def test_an_unknown_name_is_answered_with_the_merge_that_was_meant(client: httpx.Client) -> None:
    error = refusal(client.post("/generate", json={"prompt": "1", "adapter": "bothe"}), 404)
    assert "did you mean 'both'" in error["message"]
    body = {"model": "bothe", "prompt": "1"}
    assert "Did you mean 'both'?" in refusal(client.post("/v1/completions", json=body), 404)["message"]


def test_a_caller_who_may_not_use_all_of_it_does_not_know_it(client: httpx.Client) -> None:
    for reply in (
        client.post("/generate", json={"prompt": "1", "adapter": "both"}, headers=bearer(OTHER)),
        client.get("/v1/models/both", headers=bearer(OTHER)),
    ):
        assert "safety" not in refusal(reply, 404)["message"]
    models = client.get("/v1/models", headers=bearer(OTHER)).json()["data"]
    assert {"math", "intent"} <= {card["id"] for card in models}
    assert not {"both", "safety"} & {card["id"] for card in models}


def test_a_merge_of_an_adapter_that_is_not_there_fails_by_its_name(
    writer_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = make_service(writer_model, tmp_path, references=("math", "absent@0123456789ab"))
    assert "requests for the merge 'both' will fail, since there is no absent@0123456789ab" in caplog.text
    with served(service, ACME) as client:
        message = "the merge 'both' needs absent@0123456789ab, which the server cannot serve"
        for path, field, value in (
            ("/generate", "adapter", "both"),
            ("/v1/completions", "model", "both"),
            ("/v1/completions", "adapters", ["both"]),
            ("/tokenize", "model", "both"),
        ):
            error = refusal(client.post(path, json={"prompt": "1", field: value}), 404)
            assert (error["param"], error["message"]) == (field, message)
        for name in ("both", "both:2"):
            error = refusal(client.get(f"/v1/models/{name}"), 404)
            assert (error["param"], error["message"]) == ("model", message)
        assert "both" not in [card["id"] for card in client.get("/v1/models").json()["data"]]
        [row] = client.get("/adapters").json()["merges"]
        assert (row["name"], row["missing"]) == ("both", ["absent@0123456789ab"])
        assert "did you mean" not in refusal(client.post("/generate", json={"prompt": "1", "adapter": "bothe"}), 404)["message"]
        assert client.post("/generate", json={"prompt": "1", "adapter": "math", "max_tokens": 1}).status_code == 200


def test_a_merge_may_name_a_version_that_is_not_the_current_one(
    writer_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = load_base_model(str(writer_model), torch.float32, "eager")
    store = AdapterStore(write_adapters(tmp_path / "adapters", base))
    old = store.publish(store.root / "math").version
    store.add(write_adapter(tmp_path / "math", base, seed=9))
    references = [f"math@{old}", f"safety@{store.find('safety').version}"]
    write_merge(tmp_path / "merges", "old", base.identity.digest, merged_adapters(references))
    settings = {"model": str(writer_model), "adapters": str(store.root), "merges": tmp_path / "merges", "demo_adapters": False}
    with served(load_service(Settings.model_validate(settings | {"dtype": "float32", "kv_cache_gib": 0.05}))) as client:
        assert ask(client, adapter="old")["adapter"][0]["version"] == old
    assert "will fail" not in caplog.text


def test_a_damaged_adapter_of_a_merge_s_name_takes_precedence(
    writer_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "adapters" / "both").mkdir(parents=True)
    (tmp_path / "adapters" / "both" / "adapter_config.json").write_text("{")
    with served(make_service(writer_model, tmp_path), ACME) as client:
        assert "the merge 'both' cannot be requested: an adapter has its name" in caplog.text
        assert client.post("/generate", json={"prompt": "1", "adapter": "both"}).status_code == 500


def test_an_adapter_of_a_merge_s_name_takes_precedence(
    writer_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = make_service(writer_model, tmp_path)
    base = load_base_model(str(writer_model), torch.float32, "eager")
    write_adapter(tmp_path / "adapters" / "both", base, seed=7)
    with served(service, ADMIN) as client:
        client.post("/adapters/both/load").raise_for_status()
        client.headers.update(bearer(ACME))
        assert terms(ask(client, adapter="both")) == [("both", 1.0)]
        assert terms(ask(client, adapter="both")) == [("both", 1.0)]
    assert caplog.text.count("the merge 'both' cannot be requested: an adapter has its name") == 1


def test_an_adapter_of_the_policy_may_not_be_in_a_merge(writer_model: Path, tmp_path: Path) -> None:
    with served(make_service(writer_model, tmp_path, acme="policy = { safety = 1.0 }"), ACME) as client:
        error = refusal(client.post("/generate", json={"prompt": "1", "adapter": "both"}), 400)
        assert "which the operator adds to every request" in error["message"]


def test_a_merge_may_not_have_the_base_s_name(writer_model: Path, tmp_path: Path) -> None:
    name = load_base_model(str(writer_model), torch.float32, "eager").name
    with pytest.raises(AdapterError, match=f"--merges has {name}, which is also the name of the base"):
        make_service(writer_model, tmp_path, name=name)


def test_a_folder_that_cannot_be_read_is_named_with_its_flag(writer_model: Path, tmp_path: Path) -> None:
    settings = Settings(model=str(writer_model), merges=tmp_path / "absent", demo_adapters=False, dtype="float32")
    with pytest.raises(AdapterError, match=r"--merges: .*absent cannot be read: No such file"):
        load_service(settings)


BLOCKS = ([0.5, 1.5], [2.0, -1.0])


@pytest.fixture(scope="module")
def blocks(writer_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Yield a server with the merge `deep`, whose weights depend on the layer, and the adapter `built`, which is that merge."""
    place = tmp_path_factory.mktemp("blocks")
    base = load_base_model(str(writer_model), torch.float32, "eager")
    store = AdapterStore(write_adapters(place / "adapters", base))
    write_adapter(store.root / "law", base, seed=4, templates=("chat", "plain"))
    adapters = [store.find(name).load() for name in ("math", "safety")]
    built = merge(adapters, WEIGHTS, block_weights=BLOCKS, name="built", templates=("chat", "plain"))
    save_adapter(built, place / "adapters" / "built")
    named = [
        MergedAdapter(reference=f"{one.name}@{one.version}", weight=weight, block_weights=own)
        for one, weight, own in zip(adapters, WEIGHTS, BLOCKS, strict=True)
    ]
    write_merge(place / "merges", "deep", base.identity.digest, named)
    settings = Settings(
        model=str(writer_model),
        adapters=str(store.root),
        merges=place / "merges",
        keys=write_keys(place),
        demo_adapters=False,
        dtype="float32",
        kv_cache_gib=0.05,
    )
    with served(load_service(settings), ACME) as client:
        yield client


def test_a_merge_with_block_weights_answers_as_the_adapter_that_it_makes(blocks: httpx.Client) -> None:
    reply, expected = ask(blocks, adapter="deep"), ask(blocks, adapter="built")
    assert reply["text"] == expected["text"]
    assert reply["text"] != ask(blocks, adapter=["math", "safety"], weights=WEIGHTS)["text"]
    assert terms(reply) == [("math", 0.75), ("safety", -0.25)]
    assert [adapter["block_weights"] for adapter in reply["adapter"]] == [*BLOCKS]
    assert ask(blocks, adapter="deep", weights=[0.5])["text"] == ask(blocks, adapter="built", weights=[0.5])["text"]


def test_the_merges_are_listed_with_their_weights(client: httpx.Client, blocks: httpx.Client) -> None:
    [listed] = client.get("/adapters", params={"prefix": "b", "limit": 1}).raise_for_status().json()["merges"]
    versions = {adapter["name"]: adapter["version"] for adapter in ask(client, adapter="both")["adapter"]}
    parts = [{"name": name, "version": versions[name], "weight": weight} for name, weight in zip(versions, WEIGHTS, strict=True)]
    assert listed == {"name": "both", "adapters": parts, "about": "by hand", "missing": []}
    [deep] = blocks.get("/adapters").raise_for_status().json()["merges"]
    assert [adapter["block_weights"] for adapter in deep["adapters"]] == [*BLOCKS]
    other = client.get("/adapters", headers=bearer(OTHER)).raise_for_status().json()
    assert other["merges"] == [], "it may not use `safety`"


def test_a_merge_is_shown_by_itself(client: httpx.Client) -> None:
    assert client.get("/merges/both").raise_for_status().json() == client.get("/adapters").json()["merges"][0]
    for name, key in (("bothe", ACME), ("math", ACME), ("both", OTHER)):
        assert refusal(client.get(f"/merges/{name}", headers=bearer(key)), 404)["message"] == f"there is no merge '{name}'"


def test_what_reads_adapters_says_that_it_is_a_merge(client: httpx.Client) -> None:
    for path in ("/adapters/both", "/adapters/compare?names=math,both"):
        message = refusal(client.get(path), 404)["message"]
        assert message == "there is no adapter 'both': it is a named merge, see GET /merges/both"
        assert "merge" not in refusal(client.get(path, headers=bearer(OTHER)), 404)["message"]


def test_an_unknown_model_is_answered_with_the_merges_too(client: httpx.Client) -> None:
    message = refusal(client.post("/v1/completions", json={"model": "gpt-4o", "prompt": "1"}), 404)["message"]
    assert "and the adapters and merges 'both', 'intent', 'math', 'safety'." in message


def test_pages_of_adapters_have_the_merges_among_them(client: httpx.Client) -> None:
    names: list[str] = []
    after: str | None = ""
    while after is not None:
        page = client.get("/adapters", params={"limit": 1, "after": after}).raise_for_status().json()
        [row] = [*page["adapters"], *page["merges"]]
        names.append(row["name"])
        after = page["next"]
    assert names == ["both", "intent", "math", "safety"]


def test_the_log_has_the_block_weights_and_the_merges(blocks: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "server.request")
    ask(blocks, adapter=["law", "deep"], weights=[0, 1])

    def rows() -> list[dict[str, Any]]:
        return [vars(record) for record in caplog.records if record.name == "server.request"]

    wait_until(lambda: bool(rows()), "the log line")  # it comes after the answer
    assert rows()[0]["block_weights"] == [(), *(tuple(own) for own in BLOCKS)]
    assert rows()[0]["named_merges"] == ["deep"]


def test_requests_for_a_merge_are_counted(client: httpx.Client) -> None:
    def count() -> float:
        lines = client.get("/metrics", headers=bearer(ADMIN)).raise_for_status().text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith('lori:merge_requests_total{merge="both"}'))

    before = count()
    ask(client, adapter="both")
    ask(client, adapter="math")
    assert count() == before + 1


def test_prompts_of_one_body_have_the_block_weights(blocks: httpx.Client) -> None:
    def texts(model: str) -> list[str]:
        body = {"model": model, "prompt": ["12 + 3 =", "4 + 5 ="], "max_tokens": 8, "temperature": 0}
        return [choice["text"] for choice in blocks.post("/v1/completions", json=body).raise_for_status().json()["choices"]]

    expected, plain = texts("built"), texts("math:0.75+safety:-0.25")
    assert texts("deep") == expected
    assert all(one != other for one, other in zip(expected, plain, strict=True))


def test_block_weights_stand_beside_other_adapters(blocks: httpx.Client) -> None:
    weights = [1, 0.5]
    beside = ask(blocks, adapter=["deep", "law"], weights=weights)["text"]
    assert beside == ask(blocks, adapter=["built", "law"], weights=weights)["text"]
    assert beside != ask(blocks, adapter=["math", "safety", "law"], weights=[*WEIGHTS, 0.5])["text"]
    on_two_bases = ask(blocks, adapter=["deep", "intent"], weights=weights)["text"]
    assert on_two_bases == ask(blocks, adapter=["built", "intent"], weights=weights)["text"]
    assert on_two_bases != ask(blocks, adapter="deep")["text"]
    reply = ask(blocks, adapter=["deep", "intent"], weights=[0, 1])
    assert reply["text"] == ask(blocks, adapter="intent")["text"]
    assert not any("block_weights" in adapter for adapter in reply["adapter"])


def test_a_weight_that_makes_block_weights_too_large_is_refused(blocks: httpx.Client) -> None:
    error = refusal(blocks.post("/generate", json={"prompt": "1", "adapter": "deep", "weights": [16]}), 400)
    assert error["param"] == "weights"
    assert "the weight 18 in a block of layers, expected -16 to 16" in error["message"]


def test_the_root_of_a_merge_with_block_weights_is_its_name(blocks: httpx.Client) -> None:
    for name in ("deep", "deep:2", "deep:2+law:1"):
        assert blocks.get(f"/v1/models/{name}").raise_for_status().json()["root"] == name
    assert blocks.get("/v1/models/deep:1+intent:1").raise_for_status().json()["root"] == "deep:1+intent:1"
