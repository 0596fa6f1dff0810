"""OpenAI's routes, called by the official client."""

import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch

from lori.base_model import BaseModel
from lori.template import encode
from server.loading import fingerprint
from tests.server.live import LIMIT_S, Live, events

FOX = "The quick brown fox jumps over the lazy dog. "
MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 12 times 7?"}]
BASE = "tiny-writer"


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=LIMIT_S) as client:
        yield client


def lori(reply: Any) -> dict[str, Any]:
    """Return the fields of a reply that this server adds to OpenAI's."""
    extra: dict[str, Any] = reply.model_extra["lori"]
    return extra


@pytest.mark.parametrize(
    ("model", "adapter"),
    [
        (BASE, None),
        ("math", "math"),
        ("math+safety", ["math", "safety"]),
        ("math:0.7+safety:-0.3", [{"name": "math", "weight": 0.7}, {"name": "safety", "weight": -0.3}]),
        ("intent:2", [{"name": "intent", "weight": 2.0}]),
    ],
)
def test_a_model_names_adapters_and_their_weights(live: Live, client: openai.OpenAI, model: str, adapter: Any) -> None:
    own = live.generate(prompt=FOX, adapter=adapter, max_tokens=24)
    reply = client.completions.create(model=model, prompt=FOX, max_tokens=24, temperature=0)
    assert [choice.text for choice in reply.choices] == [own["text"]]
    assert reply.choices[0].finish_reason == "length"
    assert (reply.model, reply.object) == (model, "text_completion")
    assert lori(reply)["adapter"] == own["adapter"]
    assert lori(reply)["merge"] == own["merge"]
    assert reply.usage is not None
    assert reply.usage.total_tokens == own["usage"]["total_tokens"]


def test_a_version_is_a_model(live: Live, client: openai.OpenAI) -> None:
    version = next(a["version"] for a in live.client.get("/adapters").json()["adapters"] if a["name"] == "math")
    reply = client.completions.create(model=f"math@{version[:6]}", prompt=FOX, max_tokens=8, temperature=0)
    assert reply.choices[0].text == live.generate(prompt=FOX, adapter="math", max_tokens=8)["text"]


def test_adapters_may_stand_beside_the_base_model(live: Live, client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model=BASE,
        prompt=FOX,
        max_tokens=16,
        temperature=0,
        extra_body={"adapters": ["math", "safety"], "weights": [1, 0.5], "merge": "ties", "density": 0.4},
    )
    own = live.generate(prompt=FOX, adapter=["math", "safety"], weights=[1, 0.5], merge="ties", density=0.4, max_tokens=16)
    assert reply.choices[0].text == own["text"]
    assert lori(reply)["merge"] == own["merge"]


def test_a_conversation_is_answered(live: Live, client: openai.OpenAI) -> None:
    own = live.generate(messages=MESSAGES, adapter="math", max_tokens=20)
    reply = client.chat.completions.create(model="math", messages=MESSAGES, max_completion_tokens=20, temperature=0)
    assert reply.choices[0].message.content == own["text"]
    assert reply.choices[0].message.role == "assistant"
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "12 times 7?"}]},
    ]
    same = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is\n12 times 7?"}]
    replies = [
        client.chat.completions.create(model="math", messages=form, max_tokens=20, temperature=0)  # type: ignore[call-overload]  # plain dicts
        for form in (parts, same)
    ]
    assert replies[0].choices[0].message.content == replies[1].choices[0].message.content


NULLS = ("temperature", "top_p", "n", "stop", "presence_penalty", "frequency_penalty", "logit_bias", "user", "stream_options")


def test_a_null_field_counts_as_absent(live: Live) -> None:
    """Send null for optional fields, as OpenAI's clients do for None."""
    for route, body, more in (
        ("completions", {"prompt": FOX}, ("max_tokens", "echo", "logprobs", "best_of", "suffix", "weights")),
        ("chat/completions", {"messages": MESSAGES, "max_tokens": 8}, ("logprobs", "top_logprobs", "tools", "metadata")),
    ):
        body |= {"model": "math", "seed": 7}
        plain, null = (
            live.client.post(f"/v1/{route}", json=one) for one in (body, body | dict.fromkeys((*NULLS, *more, "stream")))
        )
        assert plain.status_code == null.status_code == 200, null.text
        assert plain.json()["choices"] == null.json()["choices"]
    assert live.client.post("/v1/completions", json={"prompt": None}).status_code == 400
    assert live.client.post("/v1/completions", json={"prompt": FOX, "temprature": None}).status_code == 400


def test_an_answer_can_be_sent_back_unchanged(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "math", "max_tokens": 8, "temperature": 0}
    first = client.chat.completions.create(messages=MESSAGES, **asked).choices[0].message
    more = {"role": "user", "content": "And 13?", "name": "bob"}
    replies = [
        client.chat.completions.create(messages=[*MESSAGES, answer, more], **asked)  # type: ignore[list-item]  # plain dicts
        for answer in (first.model_dump(), {"role": "assistant", "content": first.content})
    ]
    assert replies[0].choices[0].message == replies[1].choices[0].message


def test_a_part_of_a_character_has_no_bytes_of_its_own(client: openai.OpenAI, writer: BaseModel) -> None:
    half = next(i for i in range(1000) if writer.tokenizer.decode([i]) == "\ufffd")
    reply = client.chat.completions.create(
        model=BASE, messages=MESSAGES, max_tokens=1, logprobs=True, top_logprobs=2, logit_bias={str(half): 100}, temperature=0
    )
    assert reply.choices[0].logprobs
    assert reply.choices[0].logprobs.content
    [token] = reply.choices[0].logprobs.content
    assert (token.token, token.bytes) == ("\ufffd", None)
    assert all(other.bytes == list(other.token.encode()) for other in token.top_logprobs if "\ufffd" not in other.token)


@pytest.mark.slow
def test_a_chat_may_fill_the_whole_context(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model=BASE, messages=MESSAGES, temperature=0, stop=["\x00"])
    assert reply.usage is not None
    assert reply.usage.total_tokens == client.models.list().data[0].model_extra["max_model_len"]  # type: ignore[index]  # the server sends this field


@pytest.mark.parametrize("n", [1, 3])
def test_a_streamed_chat_equals_the_whole_reply(client: openai.OpenAI, n: int) -> None:
    asked: dict[str, Any] = {"model": "math", "messages": MESSAGES, "max_tokens": 20, "seed": 5, "n": n}
    asked |= {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked)
    texts, reasons, tokens, usage = [""] * n, [""] * n, [0] * n, None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or ""
            tokens[choice.index] += len(choice.logprobs.content) if choice.logprobs else 0
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert tokens == [len(choice.logprobs.content) for choice in whole.choices]
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    assert len(set(texts)) == n


def test_a_stream_begins_with_the_role_and_ends_with_done(live: Live) -> None:
    body = {"model": BASE, "messages": MESSAGES, "max_tokens": 3, "stream": True}
    with live.client.stream("POST", "/v1/chat/completions", json=body) as reply:
        lines = [line for line in reply.iter_lines() if line and not line.startswith(":")]
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.headers["x-accel-buffering"] == "no"
    assert '"delta":{"role":"assistant","content":""}' in lines[0]
    assert '"finish_reason":null' in lines[0]
    assert '"delta":{}' in lines[-2]
    assert lines[-1] == "data: [DONE]"
    assert not any("usage" in line for line in lines)


def test_every_reply_has_the_system_fingerprint(live: Live, client: openai.OpenAI) -> None:
    name = live.generate(prompt=FOX, max_tokens=1)["system_fingerprint"]
    assert name == fingerprint(torch.float32, torch.device("cpu"), None)
    chat = {"model": "math", "messages": MESSAGES, "max_tokens": 1}
    completion = {"model": "math", "prompt": FOX, "max_tokens": 1}
    assert client.chat.completions.create(**chat).system_fingerprint == name
    assert client.completions.create(**completion).system_fingerprint == name
    assert {chunk.system_fingerprint for chunk in client.chat.completions.create(**chat, stream=True)} == {name}
    assert {part.system_fingerprint for part in client.completions.create(**completion, stream=True)} == {name}
    with live.client.stream("POST", "/generate", json={"prompt": FOX, "max_tokens": 1, "stream": True}) as stream:
        *_, (_, done) = events(stream.iter_lines())
    assert done["system_fingerprint"] == name


def test_one_prompt_sent_several_times_is_drawn_several_times(client: openai.OpenAI) -> None:
    """Regression: one seed for all prompts drew the same tokens for each. The seed of the reply reproduces all of them."""
    asked: dict[str, Any] = {"model": "math", "prompt": [FOX] * 4, "max_tokens": 20, "temperature": 1}
    reply = client.completions.create(**asked)
    texts = [choice.text for choice in reply.choices]
    assert len({*texts}) > 1
    again = client.completions.create(**asked, seed=lori(reply)["seed"])
    assert [choice.text for choice in again.choices] == texts


def test_several_prompts_run_together_in_every_form(live: Live, client: openai.OpenAI, writer: BaseModel) -> None:
    prompts = [FOX, "one two three", "x"]
    ids = [encode(writer.tokenizer, prompt).ids for prompt in prompts]
    alone = [live.generate(prompt=prompt, adapter="math", max_tokens=12)["text"] for prompt in prompts]
    asked: dict[str, Any] = {"model": "math", "max_tokens": 12, "temperature": 0}
    for form in (prompts, ids):
        reply = client.completions.create(prompt=form, **asked)
        assert [choice.index for choice in reply.choices] == [0, 1, 2]
        assert [choice.text for choice in reply.choices] == alone
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == sum(map(len, ids))
    assert client.completions.create(prompt=ids[0], **asked).choices[0].text == alone[0]
    texts = [""] * 6
    for chunk in client.completions.create(prompt=prompts, n=2, stream=True, **asked):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [text for text in alone for _ in range(2)]


def test_echoed_log_probabilities_are_those_of_transformers(client: openai.OpenAI, writer: BaseModel) -> None:
    ids = encode(writer.tokenizer, FOX).ids
    with torch.inference_mode():
        expected = writer.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    for prompt in (FOX, ids):
        reply = client.completions.create(model=BASE, prompt=prompt, echo=True, logprobs=2, max_tokens=1, temperature=0)
        logprobs = reply.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        assert logprobs.top_logprobs is not None
        assert logprobs.token_logprobs[0] is None
        assert len(logprobs.token_logprobs) == len(ids) + 1
        for place in range(1, len(ids)):
            assert logprobs.token_logprobs[place] == pytest.approx(float(expected[place - 1, ids[place]]), abs=1e-3)
            assert max(logprobs.top_logprobs[place].values()) == pytest.approx(float(expected[place - 1].max()), abs=1e-3)


def test_models_are_listed_with_their_parents_and_versions(live: Live, client: openai.OpenAI) -> None:
    cards = {card.id: card.model_extra or {} for card in client.models.list()}
    assert list(cards) == [BASE, "intent", "math", "safety"]
    assert (cards[BASE]["parent"], cards[BASE]["root"]) == (None, BASE)
    versions = {a["name"]: a["version"] for a in live.client.get("/adapters").json()["adapters"]}
    for name, version in versions.items():
        assert (cards[name]["parent"], cards[name]["root"]) == (BASE, f"{name}@{version}")
    assert client.models.retrieve("math").id == "math"
    with pytest.raises(openai.NotFoundError, match="The model `maths` does not exist"):
        client.models.retrieve("maths")


@pytest.mark.parametrize(
    ("model", "hint"),
    [
        ("maths", "Did you mean 'math'?"),
        ("math+maths", "There is no adapter 'maths': did you mean 'math'?"),
        ("../math", "Did you mean 'math'?"),
        ("math:x", "Did you mean 'math'?"),
        ("Math", "Did you mean 'math'?"),
        ("math++safety", "Did you mean 'math+safety'?"),
        ("math@ffffffffffff", "Did you mean 'math'?"),
        ("m" * 4000, "There are the base model 'tiny-writer' and the adapters 'intent', 'math', 'safety'."),
    ],
)
def test_an_unknown_model_is_refused_in_vllms_words(client: openai.OpenAI, model: str, hint: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model=model, prompt=FOX)
    assert caught.value.body == {
        "message": f"The model `{model}` does not exist. {hint}",
        "type": "NotFoundError",
        "param": "model",
        "code": 404,
    }


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"model": "math:0.5+safety"}, "model", "1 weights for 2 adapters"),
        ({"model": "math:99"}, "model", "expected -16 to 16"),
        ({"model": "math+math"}, "model", "twice"),
        ({"model": "math", "adapters": ["safety"]}, "adapters", "beside the model 'math'"),
        ({"model": "math:1", "weights": [1]}, "weights", "one of the two"),
        ({"adapters": ["math"], "weights": [1, 2]}, "weights", "2 weights, expected 1"),
        ({"adapters": ["maths"]}, "adapters", "there is no adapter 'maths'"),
        ({"stream_options": {"include_usage": True}}, None, "'stream' is false"),
        ({"stream": True, "stream_options": {"include": True}}, "stream_options.include", "unknown field"),
        ({"suffix": "x"}, "suffix", "None"),
        ({"best_of": 3}, None, "expected as many as 'n'"),
        ({"functions": []}, "functions", "unknown field"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "pattern"),
        ({"logit_bias": {"100000": 1}}, "logit_bias", "names the token 100000"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": [[]]}, "prompt", "at least 1 item"),
        ({"prompt": [1, 99999]}, "prompt", "has the token 99999"),
        ({"prompt": ["a", 1]}, "prompt", "string"),
        ({"max_tokens": 100000}, "max_tokens", "exceeds the context"),
    ],
)
def test_an_invalid_completion_is_refused_by_field(live: Live, body: dict[str, Any], param: str | None, message: str) -> None:
    reply = live.client.post("/v1/completions", json={"prompt": FOX} | body)
    error = reply.json()["error"]
    assert reply.status_code == error["code"] == (404 if "no adapter" in message else 400)
    assert (error["param"] or "").startswith(param or "")
    assert message in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "at most 0 items"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'system', 'developer'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "'text'"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, None, "found both"),
        ({"top_logprobs": 2}, None, "'top_logprobs' needs"),
        ({"messages": []}, "messages", "at least 1 item"),
    ],
)
def test_an_invalid_chat_is_refused_by_field(live: Live, body: dict[str, Any], param: str | None, message: str) -> None:
    reply = live.client.post("/v1/chat/completions", json={"messages": MESSAGES} | body)
    error = reply.json()["error"]
    assert reply.status_code == error["code"] == 400
    assert (error["param"] or "").startswith(param or "")
    assert message in error["message"]


WRITTEN: dict[str, Any] = {"no_stop_trim": False, "skip_special_tokens": True, "return_hidden_states": False}
"""Fields that vllm-router 0.1.17 writes into every body that it forwards."""
IN_CHATS = {"continue_final_message": False, "separate_reasoning": True, "stream_reasoning": True, "include_reasoning": True}


def test_the_fields_that_vllm_router_adds_change_nothing(live: Live) -> None:
    for route, body, written in (
        ("completions", {"prompt": FOX, "echo": False}, WRITTEN),
        ("chat/completions", {"messages": MESSAGES, "logprobs": False}, WRITTEN | IN_CHATS),
    ):
        body |= {"model": "math", "max_tokens": 8, "temperature": 0, "stream": False, "ignore_eos": False}
        plain, routed = (live.client.post(f"/v1/{route}", json=one) for one in (body, body | written))
        assert plain.status_code == routed.status_code == 200, routed.text
        assert plain.json()["choices"] == routed.json()["choices"]


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
@pytest.mark.parametrize("field", WRITTEN)
def test_other_values_of_vllm_router_s_fields_are_refused(live: Live, route: str, field: str) -> None:
    body = {"prompt": FOX} if route == "completions" else {"messages": MESSAGES}
    reply = live.client.post(f"/v1/{route}", json=body | {field: not WRITTEN[field]})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == field


def test_a_body_from_which_vllm_router_took_the_adapter_is_refused(live: Live) -> None:
    """Send a body as the router forwards it to /generate, with SGLang's fields only. The base model must not answer it."""
    body = {"prompt": FOX, "stream": False, "return_logprob": False, "return_hidden_states": False}
    reply = live.client.post("/generate", json=body)
    assert reply.status_code == 400
    assert "return_logprob" in reply.json()["error"]["message"]


def test_text_is_tokenized_and_detokenized(live: Live, writer: BaseModel) -> None:
    ids = encode(writer.tokenizer, FOX).ids
    reply = live.client.post("/tokenize", json={"prompt": FOX, "model": "math", "return_token_strs": True}).json()
    assert (reply["tokens"], reply["count"]) == (ids, len(ids))
    assert "".join(reply["token_strs"]) == FOX
    assert live.client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": FOX}
    chat = live.client.post("/tokenize", json={"messages": MESSAGES}).json()
    assert chat["count"] == live.generate(messages=MESSAGES, max_tokens=1)["usage"]["prompt_tokens"]
    assert live.client.post("/tokenize", json={"prompt": FOX, "model": "maths"}).status_code == 404
    assert live.client.post("/detokenize", json={"tokens": [2**30]}).json() == {"prompt": ""}


ANSWER = {
    "type": "object",
    "properties": {"answer": {"enum": ["yes", "no"]}, "sure": {"type": "boolean"}},
    "required": ["answer", "sure"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("is_stream", [False, True])
def test_an_answer_has_the_format_that_was_asked_for(client: openai.OpenAI, is_stream: bool) -> None:
    asked: dict[str, Any] = {"model": "math+safety", "messages": MESSAGES, "max_tokens": 200, "seed": 3}
    asked |= {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER, "strict": True}}}
    if is_stream:
        chunks = [choice for chunk in client.chat.completions.create(**asked, stream=True) for choice in chunk.choices]
        text, reason = "".join(choice.delta.content or "" for choice in chunks), chunks[-1].finish_reason
    else:
        choice = client.chat.completions.create(**asked).choices[0]
        text, reason = choice.message.content or "", choice.finish_reason
    assert reason == "stop"
    answer = json.loads(text)
    assert answer.keys() == {"answer", "sure"}
    assert answer["answer"] in ("yes", "no")


def test_text_is_a_format_too(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": BASE, "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    plain = client.chat.completions.create(**asked)
    assert client.chat.completions.create(**asked, response_format={"type": "text"}).choices[0] == plain.choices[0]


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        ({"type": "regex", "pattern": "(ab|cd){2,3}!"}, r"(ab|cd){2,3}!"),
        ({"type": "lark", "text": 'start: "x" digit+ "y"\ndigit: "1" | "2"'}, r"x[12]+y?"),
        ({"type": "json_schema", "schema": {"enum": ["one", "two"]}}, '"(one|two)"'),
    ],
)
def test_generate_follows_a_grammar(live: Live, grammar: dict[str, Any], pattern: str) -> None:
    reply = live.generate(prompt=FOX, grammar=grammar, temperature=1, max_tokens=30, adapter="math")
    assert re.fullmatch(pattern, reply["text"])
    assert reply["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("/generate", {"grammar": {"type": "regex", "pattern": "(("}}, "grammar", "regex"),
        ("/generate", {"grammar": {"type": "json_schema", "schema": {"type": "nothing"}}}, "grammar", "json_schema"),
        ("/generate", {"grammar": {"type": "yaml"}}, "grammar", "'json_object'"),
        ("/generate", {"grammar": {"type": "regex", "pattern": ""}}, "grammar", "at least 1"),
        ("/generate", {"grammar": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos", "grammar"),
        ("/v1/completions", {"response_format": {"type": "json_schema"}}, "response_format", "required"),
        ("/v1/completions", {"response_format": {"type": "text"}, "grammar": {"type": "json_object"}}, None, "found both"),
    ],
)
def test_an_invalid_format_is_refused(live: Live, path: str, body: dict[str, Any], param: str | None, message: str) -> None:
    reply = live.client.post(path, json={"prompt": FOX} | body)
    error = reply.json()["error"]
    assert reply.status_code == 400, reply.text
    assert (error["param"] or "").startswith(param or "")
    assert message in error["message"]
