"""First tries of people who know other servers: each works, or is answered with what to type instead."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from server.arguments import read_arguments
from server.cluster.settings import ClusterSettings
from server.settings import Settings
from tests.server.live import Live

FOX = "The quick brown fox"
MESSAGES = [{"role": "user", "content": FOX}]
GENERATE, COMPLETIONS, CHAT, TOKENIZE = "/generate", "/v1/completions", "/v1/chat/completions", "/tokenize"
LEAST: dict[str, dict[str, Any]] = {
    GENERATE: {"prompt": FOX, "max_tokens": 2},
    COMPLETIONS: {"prompt": FOX, "max_tokens": 2},
    CHAT: {"messages": MESSAGES, "max_tokens": 2},
    TOKENIZE: {"prompt": FOX},
}
"""A body that each route accepts."""
JSON_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def refused(origin: str, path: str, body: dict[str, Any], *hints: str, param: str | None = None) -> Any:
    """Return a try that is refused by the field `param`, by default the first of `body`, with `hints` in the message."""
    return pytest.param(path, body, param or next(iter(body)), hints, id=f"{origin} {path} {' '.join(body)}")


REFUSED = [
    # the format of an answer
    refused("vLLM", CHAT, {"guided_json": JSON_SCHEMA}, 'use \'grammar\': {"type": "json_schema", "schema": …}'),
    refused("vLLM", COMPLETIONS, {"guided_regex": "a+"}, 'use \'grammar\': {"type": "regex", "pattern": …}'),
    refused("vLLM", GENERATE, {"guided_choice": ["yes", "no"]}, 'use \'grammar\': {"type": "regex", "pattern": "yes|no"}'),
    refused("vLLM", CHAT, {"guided_grammar": "root ::= x"}, 'use \'grammar\': {"type": "lark", "text": …}'),
    refused("vLLM", CHAT, {"structured_outputs": {"regex": "a+"}}, "use 'grammar' with one of the types", "'regex'"),
    refused("TGI", GENERATE, {"response_format": {"type": "json_object"}}, "use 'grammar' with one of the types"),
    refused("TGI", GENERATE, {"grammar": {"type": "json", "value": {}}}, "'json_object', 'json_schema', 'regex', 'lark'"),
    refused(
        "TGI", GENERATE, {"grammar": {"type": "regex", "value": "a"}}, "as 'type' has it", "pattern", param="grammar.pattern"
    ),
    refused("llama.cpp", COMPLETIONS, {"grammar": "root ::= x"}, 'expected {"type": "lark", "text": …}'),
    refused("llama.cpp", COMPLETIONS, {"json_schema": JSON_SCHEMA}, 'use \'grammar\': {"type": "json_schema"'),
    refused("Ollama", CHAT, {"format": "json"}, "use 'grammar' with one of the types 'json_object'"),
    refused("OpenAI", CHAT, {"response_format": "json_object"}, 'expected {"type": "json_object"}'),
    # the length of an answer
    refused("TGI", GENERATE, {"max_new_tokens": 20}, "use 'max_tokens'"),
    refused("Ollama", GENERATE, {"num_predict": 20}, "use 'max_tokens'"),
    refused("llama.cpp", COMPLETIONS, {"n_predict": 20}, "use 'max_tokens'"),
    refused("OpenAI", COMPLETIONS, {"max_completion_tokens": 20}, "use 'max_tokens'"),
    refused("OpenAI", CHAT, {"max_output_tokens": 20}, "use 'max_tokens'"),
    refused("llama.cpp", CHAT, {"max_tokens": -1}, "leave it out for a long answer"),
    refused("transformers", GENERATE, {"min_new_tokens": 2}, "use 'min_tokens'"),
    refused("Ollama", GENERATE, {"num_ctx": 4096}, "the context is the model's own", "--kv-cache-gib"),
    refused("TGI", GENERATE, {"truncate": 100}, "no prompt is cut"),
    # sampling
    refused("Ollama", GENERATE, {"repeat_penalty": 1.1}, "use 'repetition_penalty'"),
    refused("TGI", GENERATE, {"do_sample": True}, "use 'temperature'"),
    refused("TGI", GENERATE, {"typical_p": 0.9}, "sampling is set by 'temperature', 'top_p', 'top_k' and 'min_p'"),
    refused("llama.cpp", COMPLETIONS, {"mirostat": 2}, "sampling is set by 'temperature'"),
    refused("vLLM", COMPLETIONS, {"use_beam_search": True}, "'n' draws several answers"),
    refused("vLLM", GENERATE, {"best_of": 2}, "use 'n'"),
    refused("transformers", GENERATE, {"num_return_sequences": 2}, "use 'n'"),
    refused("Ollama", GENERATE, {"seed": -1}, "leave it out for a random one"),
    refused("vLLM", COMPLETIONS, {"bad_words": ["x"]}, "use 'logit_bias'"),
    refused("TGI", GENERATE, {"stop_sequences": ["\n"]}, "use 'stop'"),
    refused("vLLM", CHAT, {"stop_token_ids": [2]}, "use 'stop', with texts"),
    # log-probabilities
    refused("OpenAI", COMPLETIONS, {"logprobs": True}, "say how many alternatives"),
    refused("OpenAI", GENERATE, {"logprobs": True}, "say how many alternatives"),
    refused("OpenAI", CHAT, {"logprobs": 5}, "use 'logprobs': true with 'top_logprobs': 5"),
    refused("OpenAI", COMPLETIONS, {"top_logprobs": 5}, "use 'logprobs'"),
    refused("llama.cpp", COMPLETIONS, {"n_probs": 5}, "use 'logprobs'"),
    refused("vLLM", COMPLETIONS, {"prompt_logprobs": 1}, "use 'echo': true with 'logprobs'"),
    # adapters and models
    refused("LoRAX", GENERATE, {"adapter_id": "math"}, "use 'adapter': \"math\"", "GET /adapters"),
    refused("LoRAX", CHAT, {"adapter_id": "math"}, "use 'model': \"math\"", "GET /v1/models"),
    refused("LoRAX", GENERATE, {"adapter_source": "hub"}, "by name"),
    refused("LoRAX", GENERATE, {"merged_adapters": {"ids": ["math"]}}, "use 'adapter': [", "'weights', 'merge' and 'density'"),
    refused("llama.cpp", COMPLETIONS, {"lora": [{"id": 0, "scale": 1}]}, "use 'model': \"math\""),
    refused("vLLM", GENERATE, {"lora_request": {"lora_name": "math"}}, "use 'adapter': \"math\""),
    refused("vLLM", GENERATE, {"model": "math"}, "adapters are named by 'adapter'"),
    refused("vLLM", CHAT, {"model_name": "math"}, "use 'model'"),
    refused("here", GENERATE, {"adapters": ["math"]}, "use 'adapter', which takes a list"),
    refused("here", COMPLETIONS, {"adapter": "math"}, "use 'model': \"math\""),
    refused(
        "LangChain",
        CHAT,
        {"messages": [{"role": "user", "content": "x", "id": "run-1"}]},
        "messages have no ids here",
        param="messages.0.id",
    ),
    refused("here", GENERATE, {"adapter": [{"id": "math", "scale": 1}]}, "use 'name'", "use 'weight'", param="adapter.0.name"),
    refused("LoRAX", CHAT, {"model": ""}, "leave it out for the base model"),
    # envelopes and prompts
    refused("TGI", GENERATE, {"parameters": {"max_new_tokens": 20}}, "beside the prompt, in the request itself"),
    refused("Ollama", GENERATE, {"options": {"num_predict": 20}}, "beside the prompt, in the request itself"),
    refused("Ollama", GENERATE, {"system": "Be brief."}, 'use \'messages\', the first with "role": "system"'),
    refused("OpenAI", CHAT, {"messages": FOX}, '[{"role": "user", "content": …}]'),
    refused("vLLM", GENERATE, {"prompt": ["a", "b"]}, "POST /v1/completions takes several", param="prompt.0"),
    refused("vLLM", CHAT, {"chat_template_kwargs": {"enable_thinking": False}}, "the chat template is that of the model's"),
    refused("OpenAI", CHAT, {"reasoning_effort": "low"}, "reasoning is not separated"),
    refused("Ollama", CHAT, {"think": True}, "reasoning is not separated"),
    refused("OpenAI", CHAT, {"tools": [{"type": "function"}]}, "tool calling is not supported"),
    refused("OpenAI", CHAT, {"functions": []}, "tool calling is not supported"),
    refused("Ollama", CHAT, {"images": ["…"]}, "only text is supported"),
    refused("Ollama", CHAT, {"keep_alive": "5m"}, "it is not supported"),
    refused("llama.cpp", COMPLETIONS, {"cache_prompt": True}, "the prefix cache is always on"),
    refused("llama.cpp", TOKENIZE, {"content": FOX}, "use 'prompt'"),
    # typos
    refused("here", GENERATE, {"temprature": 1}, "did you mean 'temperature'?"),
    refused("here", CHAT, {"maxTokens": 5}, "did you mean 'max_tokens'?"),
    refused("here", COMPLETIONS, {"top-p": 0.5}, "did you mean 'top_p'?"),
    refused("here", TOKENIZE, {"promt": FOX}, "did you mean 'prompt'?"),
    refused("here", CHAT, {"messages": [{"role": "user", "contents": FOX}]}, "'content'?", param="messages.0.content"),
    refused("here", GENERATE, {"no_such_field": 1}, "/docs lists those that there are"),
]


@pytest.mark.parametrize(("path", "body", "param", "hints"), REFUSED)
def test_a_field_of_another_server_is_answered_with_ours(
    live: Live, path: str, body: dict[str, Any], param: str, hints: tuple[str, ...]
) -> None:
    reply = live.client.post(path, json=LEAST[path] | body)
    error = reply.json()["error"]
    assert reply.status_code == 400, reply.text
    assert error["param"] == param, error
    for hint in hints:
        assert hint in error["message"]


def test_a_body_of_tgi_is_answered_field_by_field(live: Live) -> None:
    body = {"inputs": FOX, "parameters": {"max_new_tokens": 20, "adapter_id": "math"}}
    error = live.client.post(GENERATE, json=body).json()["error"]
    assert error["param"] == "inputs"
    assert error["message"] == (
        "inputs: unknown field: use 'prompt'; "
        "parameters: unknown field: its fields stand beside the prompt, in the request itself; "
        "'max_new_tokens': use 'max_tokens'; "
        """'adapter_id': use 'adapter': "math", which the server knows by name: GET /adapters lists them"""
    )  # fmt: skip


@pytest.mark.parametrize("path", [GENERATE, COMPLETIONS, CHAT, TOKENIZE])
def test_a_hint_names_only_fields_of_its_route(live: Live, path: str) -> None:
    """Check that hints suit their route: /v1/completions has no `top_logprobs`, for example, and /tokenize no `grammar`."""
    fields = live.client.get("/openapi.json").json()
    schema = fields["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    known = fields["components"]["schemas"][schema]["properties"].keys()
    for name in ("guided_json", "max_new_tokens", "n_probs", "adapter_id", "merged_adapters", "system", "stop_sequences"):
        hint = live.client.post(path, json=LEAST[path] | {name: 1}).json()["error"]["message"]
        if "use '" in hint:
            assert hint.partition("use '")[2].partition("'")[0] in known, hint


# --- names

WORKS = [
    ("math + safety", [("math", 0.5), ("safety", 0.5)]),
    (" math+ safety ", [("math", 0.5), ("safety", 0.5)]),
    ("math:.7", [("math", 0.7)]),
    ("math:1.", [("math", 1.0)]),
    ("math: 0.7 + safety : -.3", [("math", 0.7), ("safety", -0.3)]),
    ("tiny-writer", []),
    (" tiny-writer", []),
]


@pytest.mark.parametrize(("model", "named"), WORKS)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_model_may_be_written_in_several_forms(live: Live, path: str, model: str, named: list[tuple[str, float]]) -> None:
    reply = live.client.post(path, json=LEAST[path] | {"model": model})
    assert reply.status_code == 200, reply.text
    assert [(adapter["name"], adapter["weight"]) for adapter in reply.json()["lori"]["adapter"]] == named


@pytest.mark.parametrize("ending", ["", "/"])
def test_the_base_model_s_folder_means_the_base_model(live: Live, writer_model: Path, ending: str) -> None:
    model = f"{writer_model}{ending}"
    for path in (COMPLETIONS, CHAT, TOKENIZE):
        reply = live.client.post(path, json=LEAST[path] | {"model": model})
        assert reply.status_code == 200, reply.text
    assert live.client.get(f"/v1/models/{writer_model}").json()["id"] == "tiny-writer"


@pytest.mark.parametrize("model", ["math", "math+safety", "math:0.7+safety:0.3", " math + safety"])
def test_a_model_that_is_served_is_shown(live: Live, model: str) -> None:
    """Look up every form in which a request may name a model, single adapters and sums."""
    shown = live.client.get(f"/v1/models/{model}").json()
    assert (shown["id"], shown["parent"]) == (model, "tiny-writer")
    assert [part.partition("@")[0] for part in shown["root"].split("+")] == ["math", "safety"][: 1 + ("safety" in model)]


UNKNOWN = [
    ("Math", "Did you mean 'math'?"),
    ("MATH:0.7", "Did you mean 'math'?"),
    ("maths", "Did you mean 'math'?"),
    ("math,safety", "Did you mean 'math+safety'?"),
    ("math safety", "Did you mean 'math+safety'?"),
    ("math+saftey", "There is no adapter 'saftey': did you mean 'safety'?"),
    ("Tiny-Writer", "Did you mean 'tiny-writer', the base model?"),
    ("someone/tiny-writer", "Did you mean 'tiny-writer', the base model?"),
    ("gpt-4o", "There are the base model 'tiny-writer' and the adapters 'intent', 'math', 'safety'."),
    ("meta-llama/Llama-3.1-8B", "There are the base model 'tiny-writer' and the adapters 'intent', 'math', 'safety'."),
    (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "There are the base model 'tiny-writer' and the adapters 'intent', 'math', 'safety'.",
    ),
    ("llama3.2:1b", "There are the base model 'tiny-writer' and the adapters 'intent', 'math', 'safety'."),
]


@pytest.mark.parametrize(("model", "hint"), UNKNOWN)
def test_an_unknown_model_is_answered_with_the_known_ones(live: Live, model: str, hint: str) -> None:
    expected = {"message": f"The model `{model}` does not exist. {hint}", "type": "NotFoundError", "param": "model", "code": 404}
    for path in (COMPLETIONS, CHAT, TOKENIZE):
        reply = live.client.post(path, json=LEAST[path] | {"model": model})
        assert (reply.status_code, reply.json()["error"]) == (404, expected)
    reply = live.client.get(f"/v1/models/{model}")
    assert reply.status_code == 404
    assert reply.json()["error"]["message"].startswith(f"The model `{model}` does not exist.")


@pytest.mark.parametrize(
    ("adapter", "hint"),
    [
        ("Math", "did you mean 'math'?"),
        ("math+safety", 'use \'adapter\': ["math", "safety"]'),
        ("math, safety", 'use \'adapter\': ["math", "safety"]'),
        ("math:0.7", "use 'adapter': [\"math\"] with 'weights': [0.7]"),
        ("math:1+safety:.5", "use 'adapter': [\"math\", \"safety\"] with 'weights': [1, .5]"),
        ("math:auto+safety:1", 'use \'adapter\': ["math", "safety"] with \'weights\': ["auto", 1]'),
        ("tiny-writer", "leave 'adapter' out for the base model, 'tiny-writer'"),
        ("someone/math-lora", "did you mean 'math'?"),
        ("zzz", "known are 'intent', 'math', 'safety'"),
    ],
)
def test_an_unknown_adapter_is_answered_with_the_right_form(live: Live, adapter: str, hint: str) -> None:
    for form in (adapter, [adapter]):
        error = live.client.post(GENERATE, json=LEAST[GENERATE] | {"adapter": form}).json()["error"]
        assert (error["code"], error["param"]) == (404, "adapter")
        assert error["message"] == f"there is no adapter {adapter!r}: {hint}"


def test_the_base_model_among_adapters_is_refused_with_a_hint(live: Live, writer_model: Path) -> None:
    for name in ("tiny-writer", str(writer_model)):
        reply = live.client.post(COMPLETIONS, json=LEAST[COMPLETIONS] | {"adapters": [name]})
        error = reply.json()["error"]
        assert (error["code"], error["param"]) == (404, "adapters")
        assert error["message"] == f"there is no adapter {name!r}: leave 'adapters' out for the base model, 'tiny-writer'"


# --- routes

ROUTES = [
    ("POST", "/v1/chat/completion", "POST /v1/chat/completions"),
    ("POST", "/chat/completions", "POST /v1/chat/completions"),
    ("POST", "/v1/v1/chat/completions", "POST /v1/chat/completions"),
    ("POST", "/v1/completion", "POST /v1/completions"),
    ("POST", "/completions", "POST /v1/completions"),
    ("POST", "/completion", "POST /v1/completions"),
    ("POST", "/v1/generate", "POST /generate"),
    ("POST", "/generat", "POST /generate"),
    ("POST", "/generate_stream", 'POST /generate with "stream": true'),
    ("POST", "/api/generate", "POST /generate"),
    ("POST", "/api/chat", "POST /v1/chat/completions"),
    ("GET", "/api/tags", "GET /v1/models"),
    ("GET", "/models", "GET /v1/models"),
    ("GET", "/v1/model", "GET /v1/models"),
    ("GET", "/v1/adapters", "GET /adapters"),
    ("GET", "/lora-adapters", "GET /adapters"),
    ("GET", "/merges", "GET /adapters"),
    ("GET", "/info", "GET /v1/models"),
    ("GET", "/props", "GET /v1/models"),
    ("GET", "/healthz", "GET /health"),
    ("POST", "/adapters/math/lod", "POST /adapters/{name}/load"),
    ("POST", "/load_lora_adapter", "POST /v1/load_lora_adapter"),
]


@pytest.mark.parametrize(("method", "path", "hint"), ROUTES)
def test_an_unknown_route_is_answered_with_a_known_one(live: Live, method: str, path: str, hint: str) -> None:
    reply = live.client.request(method, path, json={} if method == "POST" else None)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"], error["param"]) == (404, "NotFoundError", None)
    assert error["message"].startswith(f"there is no route {method} {path}: did you mean {hint}")


@pytest.mark.parametrize(
    ("method", "path", "hint"),
    [
        ("POST", "/v1/embeddings", "there are no embeddings here"),
        ("POST", "/rerank", "reranking and classification are not supported"),
        ("GET", "/nowhere", "/docs lists those that there are"),
        ("GET", "/" + "x" * 5000, "x…: /docs lists those that there are"),
    ],
)
def test_an_unsupported_route_is_refused_with_the_reason(live: Live, method: str, path: str, hint: str) -> None:
    reply = live.client.request(method, path)
    assert reply.status_code == 404
    assert reply.json()["error"]["message"].endswith(hint)


def test_a_missing_static_file_does_not_count_as_an_unknown_route(live: Live) -> None:
    assert live.client.get("/static/nowhere.js").json()["error"]["message"] == "Not Found"


@pytest.mark.parametrize(("path", "allowed"), [(GENERATE, "POST"), (CHAT, "POST"), ("/version", "GET"), ("/ping", "GET")])
def test_a_wrong_method_is_405_as_before(live: Live, path: str, allowed: str) -> None:
    reply = live.client.put(path)
    assert (reply.status_code, reply.headers["allow"]) == (405, allowed)


def test_probes_of_other_servers_are_answered(live: Live) -> None:
    assert live.client.get("/ping").json() == {"status": "ok"}
    assert live.client.get("/version").json()["version"].count(".") == 2


def test_an_openai_client_without_v1_is_told_where_to_ask(live: Live) -> None:
    hint = r"did you mean POST /v1/chat/completions \(a base URL .* ends in /v1\)"
    with (
        openai.OpenAI(base_url=live.url, api_key="none", max_retries=0) as client,
        pytest.raises(openai.NotFoundError, match=hint),
    ):
        client.chat.completions.create(model="math", messages=[{"role": "user", "content": FOX}])


def test_a_very_long_field_name_gets_no_suggestion(live: Live) -> None:
    reply = live.client.post(GENERATE, json={"prompt": "x", "temperature" * 500: 1})
    assert reply.json()["error"]["message"].endswith("…: unknown field")


def test_many_unknown_fields_are_reported_ten_at_a_time(live: Live) -> None:
    reply = live.client.post(GENERATE, json={"prompt": "x", **{f"max_new_token_{i}": 1 for i in range(40)}})
    assert reply.json()["error"]["message"].endswith("; and 30 more")


# --- flags

FLAGS = [
    # vLLM's
    (["--max-model-len", "4096"], "--kv-cache-gib"),
    (["--tensor-parallel-size", "2"], "--replicas"),
    (["--gpu-memory-utilization", "0.9"], "--kv-cache-gib"),
    (["--gpu_memory_utilization=0.9"], "--kv-cache-gib"),
    (["--enable-lora"], "--adapters FOLDER"),
    (["--lora-modules", "math=./math"], "--adapters FOLDER"),
    (["--max-loras", "8"], "--max-resident"),
    (["--max-cpu-loras", "8"], "--loaded-gib"),
    (["--max-lora-rank", "64"], "--max-rank"),
    (["--served-model-name", "x"], "last part of its folder's path"),
    (["--api-key", "secret"], "--keys FILE"),
    (["--swap-space", "4"], "recomputed, not swapped"),
    (["--trust-remote-code"], "no model's own code is ever run"),
    (["--max-num-seqs", "8"], "--max-batch"),
    (["--max-num-batched-tokens", "2048"], "--max-step-tokens"),
    (["--enable-prefix-caching"], "it is always so"),
    (["--enforce-eager"], "it is not supported"),
    (["--chat-template", "x.jinja"], "the chat template is that of the model's tokenizer"),
    (["--data-parallel-size", "2"], "--replicas"),
    (["--revision", "main"], "hf download"),
    (["serve", "meta-llama/Llama-3.1-8B"], "the base model is given as --model NAME"),
    # TGI's and LoRAX's
    (["--model-id", "x"], "use --model"),
    (["--adapter-source", "hub"], "--hub"),
    (["--adapter-id", "x"], "--adapters FOLDER"),
    (["--num-shard", "2"], "--device"),
    (["--max-concurrent-requests", "8"], "--max-requests"),
    (["--max-total-tokens", "4096"], "--kv-cache-gib"),
    (["--quantize", "awq"], "--quantization int8"),
    (["--hostname", "0.0.0.0"], "--host"),
    (["--cors-allow-origin", "*"], "--cors-origins"),
    (["--hf-token", "secret"], "hf auth login"),
    # llama.cpp's
    (["-m", "model.gguf"], "use --model"),
    (["-hf", "ggml-org/gemma-3-1b-it-GGUF"], "there is no flag -hf: use --model, with a folder or a hub id"),
    (["-c", "4096"], "--kv-cache-gib"),
    (["--ctx-size", "4096"], "--kv-cache-gib"),
    (["-ngl", "99"], "--device"),
    (["--n-gpu-layers", "99"], "--device"),
    (["--lora", "math.gguf"], "--adapters FOLDER"),
    (["-np", "4"], "--max-batch"),
    (["--n-predict", "20"], "each request says that itself"),
    # typos
    (["--modle", "x"], "did you mean --model?"),
    (["--kv_cache_gibs", "1"], "did you mean --kv-cache-gib?"),
    (["--no-such-flag"], "--help lists them"),
]


@pytest.mark.parametrize(("words", "hint"), FLAGS, ids=lambda value: value[0] if isinstance(value, list) else None)
@pytest.mark.parametrize("settings", [Settings, ClusterSettings])
def test_a_flag_of_another_server_is_answered_with_ours(
    settings: type[Settings], words: list[str], hint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["server", *words])
    with pytest.raises(SystemExit) as ended:
        read_arguments(settings)
    line = capsys.readouterr().err
    assert ended.value.code == 2
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert hint in line
    assert "secret" not in line
    if words[0].startswith("-"):
        assert f"there is no flag {words[0].partition('=')[0]}: " in line


def test_each_of_several_unknown_flags_is_answered() -> None:
    words = ["--model-id", "x", "--max-model-len", "4096", "--prot", "1"]
    done = subprocess.run([sys.executable, "-m", "server", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "error: there is no flag --model-id: use --model, with a folder or a hub id; "
        "there is no flag --max-model-len: "
        "the context is the model's own, as far as --kv-cache-gib has room for it: leave it out; "
        "there is no flag --prot: did you mean --port?\n"
    )
