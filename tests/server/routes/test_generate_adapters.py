"""The adapters of POST /generate over a real socket: names, versions, weights, merges that equal `lori.merge`, refusals."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lori.adapter import Adapter
from lori.base_model import BaseModel, load_base_model
from lori.merge import merge
from lori.merge_options import MergeOptions
from lori.store.store import AdapterStore
from lori.template import encode
from server.engine.adapters.registry import Registry
from server.engine.admission import Admission
from server.engine.engine import Engine
from server.engine.thread import EngineThread
from server.service.service import Service
from server.settings import Settings
from server.telemetry.metrics import Metrics
from tests.server.live import Live, serve_here
from tests.server.registered import registered
from tests.server.rig import FakeEngine, fold

FOX = "The quick brown fox jumps over the lazy dog. "


@pytest.fixture(scope="module")
def parents(adapters: Path, writer: BaseModel) -> dict[str, Adapter]:
    """Return the server's adapters as `lori` reads them."""
    return {name: entry.load(writer.identity) for name, entry in AdapterStore(adapters).current().items()}


@pytest.fixture
def versions(live: Live) -> dict[str, str]:
    return {row["name"]: row["version"] for row in live.client.get("/adapters").json()["adapters"]}


def named(reply: dict[str, Any]) -> list[tuple[str, str, float, bool]]:
    return [(term["name"], term["version"], term["weight"], term["policy"]) for term in reply["adapter"]]


def error(live: Live, status: int = 400, **body: object) -> dict[str, Any]:
    reply = live.client.post("/generate", json={"prompt": "x"} | body)
    assert reply.status_code == status, reply.text
    content: dict[str, Any] = reply.json()["error"]
    return content


def scores(model: PreTrainedModel, ids: Sequence[int]) -> list[float]:
    """Return the log-probability of each token but the first, given the tokens before it."""
    with torch.inference_mode():
        rows = model(torch.tensor([[*ids]])).logits[0, :-1].log_softmax(-1)
    return rows.gather(1, torch.tensor([ids[1:]]).T)[:, 0].tolist()


def check_folded(live: Live, model: PreTrainedModel, body: dict[str, Any]) -> dict[str, Any]:
    """Check that the reply to `body` equals the output of `model`, token by token; return the reply."""
    reply = live.generate(prompt=FOX, max_tokens=16, echo=True, logprobs=0, **body)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model.name_or_path)
    ids = list(encode(tokenizer, reply["text"]).ids)
    assert len(ids) == reply["usage"]["total_tokens"]
    assert reply["logprobs"]["token_logprobs"][1:] == pytest.approx(scores(model, ids), abs=1e-3)
    with torch.inference_mode():
        likeliest = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
    assert ids[len(FOX) :] == likeliest[len(FOX) - 1 : -1]
    return reply


# --- names, versions, weights


@pytest.mark.parametrize("num_digits", [12, 11, 6, 4])
def test_a_version_s_first_digits_name_it(live: Live, versions: dict[str, str], num_digits: int) -> None:
    reference = f"math@{versions['math'][:num_digits]}"
    expected = live.generate(prompt=FOX, adapter="math", max_tokens=12)
    for form in (reference, [reference], [{"name": reference, "weight": 1}]):
        reply = live.generate(prompt=FOX, adapter=form, max_tokens=12)
        assert reply["text"] == expected["text"]
        assert named(reply) == [("math", versions["math"], 1.0, False)]


def test_unknown_versions_are_404(live: Live, versions: dict[str, str]) -> None:
    wrong = "".join("0" if digit != "0" else "1" for digit in versions["math"])
    for reference in (f"math@{wrong}", f"math@{versions['safety']}", "math@", f"math@{versions['math']}0", "@", ""):
        refusal = error(live, 404, adapter=reference)
        assert (refusal["type"], refusal["param"]) == ("NotFoundError", "adapter")
        assert refusal["message"].startswith(f"there is no adapter {reference!r}: ")
    assert "did you mean 'math'?" in error(live, 404, adapter=f"math@{wrong}")["message"]


def test_ambiguous_version_digits_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with versioned(tokenizer) as client:
        for reference, status, message in (
            ("math@ab", 400, "'math@ab' could be math@ab1000000000 or math@ab2000000000"),
            ("math@ab3", 404, "there is no adapter 'math@ab3': did you mean 'math'?"),
        ):
            reply = client.post("/generate", json={"prompt": "x", "adapter": ["safety", reference]})
            assert reply.status_code == status
            assert reply.json()["error"]["param"] == "adapter"
            assert message in reply.json()["error"]["message"]
        reply = client.post("/generate", json={"prompt": "x", "adapter": ["math@ab2", "math"]})
        assert [term["version"] for term in reply.json()["adapter"]] == ["ab2000000000", "ab1000000000"]


@contextmanager
def versioned(tokenizer: PreTrainedTokenizerFast) -> Iterator[httpx.Client]:
    """Serve adapters without files: math in two versions whose digests begin alike, and safety; yield a client."""
    registry = Registry(
        [registered("math", "ab1" + "0" * 61), registered("safety", "c" * 64)], [registered("math", "ab2" + "0" * 61)]
    )
    engine = EngineThread(cast(Engine, FakeEngine()))
    admission = Admission(tokenizer, registry, 100, max_terms=3)
    with serve_here(Service(Settings(), "fake", registry, admission, engine, Metrics("fake"))) as client:
        yield client


def test_weighted_adapters_equal_names_with_separate_weights(live: Live, versions: dict[str, str]) -> None:
    apart = live.generate(prompt=FOX, adapter=["math", "intent"], weights=[1.0, -0.5], max_tokens=16)
    together = [{"name": "math", "weight": 1}, {"name": "intent", "weight": -0.5}]
    reply = live.generate(prompt=FOX, adapter=together, max_tokens=16)
    assert reply["text"] == apart["text"]
    assert named(reply) == named(apart) == [("math", versions["math"], 1.0, False), ("intent", versions["intent"], -0.5, False)]
    assert reply["merge"] == {"method": "linear", "density": None, "sign": None, "seed": None, "base_share": None}


def test_an_empty_list_is_the_base_model(live: Live) -> None:
    base = live.generate(prompt=FOX, max_tokens=8)
    reply = live.generate(prompt=FOX, max_tokens=8, adapter=[])
    assert reply["text"] == base["text"]
    assert reply["adapter"] == []
    assert reply["merge"] is None


# --- merges


MERGES: dict[str, tuple[dict[str, Any], MergeOptions]] = {
    "linear": ({}, MergeOptions()),
    "ties": ({"merge": "ties"}, MergeOptions("ties", density=0.5)),
    "ties, denser": ({"merge": "ties", "density": 0.8}, MergeOptions("ties", density=0.8)),
    "ties, whole": ({"merge": "ties", "density": 1}, MergeOptions("ties", density=1.0)),
    "dare_linear": ({"merge": "dare_linear"}, MergeOptions("dare_linear", density=0.5, seed=0)),
    "dare_linear, drawn": (
        {"merge": "dare_linear", "density": 0.6, "merge_seed": 7},
        MergeOptions("dare_linear", density=0.6, seed=7),
    ),
    "dare_ties, drawn": ({"merge": "dare_ties", "density": 0.6, "merge_seed": 8}, MergeOptions("dare_ties", density=0.6, seed=8)),
    "magnitude": ({"merge": "magnitude", "density": 0.3}, MergeOptions("magnitude", density=0.3)),
}
WEIGHTS = (1.0, 0.75)


@pytest.mark.parametrize("name", MERGES)
def test_a_merge_generates_the_text_of_its_folded_adapter(
    live: Live, writer_model: Path, parents: dict[str, Adapter], name: str
) -> None:
    body, options = MERGES[name]
    made = merge(
        [parents["math"], parents["safety"]],
        WEIGHTS,
        options.method,
        density=options.density,
        sign=options.sign,
        seed=options.seed,
    )
    model = fold(load_base_model(str(writer_model), torch.float32).model, [(made, 1.0)])
    reply = check_folded(live, model, {"adapter": ["math", "safety"], "weights": WEIGHTS, **body})
    assert {key: value for key, value in reply["merge"].items() if value is not None} == dict(options.used)
    assert [term["weight"] for term in reply["adapter"]] == [1.0, 0.75]


def test_every_merge_gives_different_scores(live: Live) -> None:
    asked = {"prompt": FOX, "adapter": ["math", "safety"], "weights": WEIGHTS, "max_tokens": 0, "echo": True, "logprobs": 0}
    scored = {tuple(live.generate(**asked, **body)["logprobs"]["token_logprobs"][1:]) for body, _ in MERGES.values()}
    other_seed = live.generate(**asked, merge="dare_linear", density=0.6, merge_seed=8)["logprobs"]["token_logprobs"]
    assert len(scored | {tuple(other_seed[1:])}) == len(MERGES) + 1


def test_without_weights_each_adapter_of_a_merge_weighs_1_nth(live: Live) -> None:
    body = {"prompt": FOX, "adapter": ["math", "safety"], "merge": "ties", "max_tokens": 16}
    bare, weighted = live.generate(**body), live.generate(**body, weights=[0.5, 0.5])
    assert [term["weight"] for term in bare["adapter"]] == [0.5, 0.5]
    assert bare["text"] == weighted["text"]


def test_a_merge_s_order_makes_no_difference(live: Live) -> None:
    one, other = (
        live.generate(prompt=FOX, adapter=adapter, merge="ties", max_tokens=16)
        for adapter in (
            [{"name": "math", "weight": 1}, {"name": "safety", "weight": 0.75}],
            [{"name": "safety", "weight": 0.75}, {"name": "math", "weight": 1}],
        )
    )
    assert one["text"] == other["text"]
    assert one["adapter"] == other["adapter"][::-1]


def test_a_streamed_merge_reports_its_options(live: Live) -> None:
    body = {"prompt": FOX, "adapter": ["math", "safety"], "merge": "dare_ties", "density": 0.4, "merge_seed": 3, "max_tokens": 8}
    reply = live.generate(**body)
    assert reply["merge"] == {"method": "dare_ties", "density": 0.4, "sign": "total", "seed": 3, "base_share": None}
    with live.client.stream("POST", "/generate", json=body | {"stream": True}) as streamed:
        shown = '"merge":{"method":"dare_ties","density":0.4,"sign":"total","seed":3,"base_share":null}'
        assert shown in streamed.read().decode()


# --- refusals


MATH, SAFETY = {"name": "math", "weight": 1}, {"name": "safety", "weight": 1}


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        pytest.param({"adapter": ["math", MATH]}, "adapter.1", "valid string, found {'name'", id="names and weights mixed"),
        pytest.param({"adapter": [MATH, "safety"]}, "adapter.1", "found 'safety'", id="weights and names mixed"),
        pytest.param({"adapter": MATH}, "adapter", "found {'name'", id="no list"),
        pytest.param({"adapter": [MATH, MATH]}, "adapter", "'math' twice", id="twice"),
        pytest.param({"adapter": [MATH], "weights": [1]}, None, "'weights' is for names", id="weights twice"),
        pytest.param({"adapter": [MATH, SAFETY | {"weight": 17}]}, "adapter.1.weight", "found 17", id="a heavy weight"),
        pytest.param({"adapter": [MATH, SAFETY | {"weight": "1"}]}, "adapter.1.weight", "found '1'", id="a weight is text"),
        pytest.param({"adapter": [{"name": "math"}]}, "adapter.0.weight", "required", id="no weight"),
        pytest.param({"adapter": [{"weight": 1}]}, "adapter.0.name", "required", id="no name"),
        pytest.param({"adapter": [MATH, SAFETY | {"scale": 2}]}, "adapter.1.scale", "unknown field", id="an unknown field"),
        pytest.param({"adapter": ["math", 3]}, "adapter.1", "valid string, found 3", id="a number among names"),
        pytest.param({"adapter": ["math"] * 65}, "adapter", "at most 64 items", id="many names"),
        pytest.param({"adapter": [MATH] * 65}, "adapter", "at most 64 items", id="many weights"),
        pytest.param({"adapter": "x" * 257}, "adapter", "at most 256", id="a long name"),
        pytest.param({"adapter": ["math"], "weights": []}, "weights", "has 0 weights, expected 1", id="empty weights"),
        pytest.param({"adapter": "math", "merge": "slerp"}, "merge", "found 'slerp'", id="an unknown merge"),
        pytest.param(
            {"adapter": "math", "density": 0.5}, None, "'density' is for merges that are no sums", id="density of a sum"
        ),
        pytest.param({"adapter": "math", "merge": "linear", "density": 0.5}, None, "'merge' is 'linear'", id="density of linear"),
        pytest.param({"adapter": "math", "merge_seed": 1}, None, "'merge_seed' is for 'dare_linear'", id="a seed of a sum"),
        pytest.param({"adapter": "math", "merge": "ties", "merge_seed": 1}, None, "'merge' is 'ties'", id="a seed of ties"),
        pytest.param({"adapter": "math", "merge": "magnitude", "merge_seed": 1}, None, "'magnitude'", id="a seed of magnitude"),
        pytest.param({"adapter": "math", "merge": "ties", "density": 0}, "density", "found 0", id="density 0"),
        pytest.param({"adapter": "math", "merge": "ties", "density": 1.1}, "density", "found 1.1", id="density 1.1"),
        pytest.param({"adapter": "math", "merge": "dare_ties", "merge_seed": -1}, "merge_seed", "found -1", id="merge_seed -1"),
        pytest.param({"merge": "ties"}, "merge", "is 'ties' without adapters", id="a merge of nothing"),
        pytest.param({"adapter": [], "merge": "ties"}, "merge", "is 'ties' without adapters", id="a merge of an empty list"),
        pytest.param({"adapter": ["math", "intent"], "merge": "ties"}, "merge", "ties needs adapters on one basis", id="bases"),
    ],
)
def test_conflicting_fields_are_refused_by_name(live: Live, body: dict[str, Any], param: str | None, message: str) -> None:
    refusal = error(live, **body)
    assert refusal["param"] == param
    assert message in refusal["message"]


@pytest.mark.parametrize("long", [["n" * 200] * 64, [{"name": "n" * 200, "weight": 1}] * 64])
def test_many_long_names_are_refused_in_a_few_words(live: Live, long: list[Any]) -> None:
    refusal = error(live, 404, adapter=long)
    assert len(refusal["message"]) < 400
