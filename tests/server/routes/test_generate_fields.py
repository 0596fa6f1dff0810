"""The fields of POST /generate over a real socket: several answers, where and when each ends, and refusals."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from tests.server.live import Live, events, wait_until
from tests.server.replies import FOR_EVER, FOX, USAGE
from tests.server.rig import EOS


def error(live: Live, status: int = 400, **body: object) -> dict[str, Any]:
    reply = live.client.post("/generate", json={"prompt": "x"} | body)
    assert reply.status_code == status, reply.text
    content: dict[str, Any] = reply.json()["error"]
    return content


def stream(live: Live, **body: object) -> list[tuple[str, dict[str, Any]]]:
    with live.client.stream("POST", "/generate", json=body | {"stream": True}) as reply:
        assert reply.status_code == 200, reply.read()
        return list(events(reply.iter_lines()))


# --- several answers

WARM = {"temperature": 1.0, "top_k": 20, "seed": 11, "max_tokens": 16}


def test_several_answers_differ_and_cost_one_prompt(live: Live) -> None:
    prompt = f"Several: {FOX}"
    reply = live.generate(prompt=prompt, n=4, logprobs=1, **WARM)
    choices = reply["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert len({choice["text"] for choice in choices}) == 4
    for key in ("text", "finish_reason", "logprobs"):
        assert reply[key] == choices[0][key]
    usage = reply["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), 4 * 16)
    assert usage["total_tokens"] == len(prompt) + 4 * 16
    assert [len(choice["logprobs"]["tokens"]) for choice in choices] == [16] * 4


def test_the_first_answer_is_the_one_that_the_seed_gives_alone(live: Live) -> None:
    alone, two, five = (live.generate(prompt=FOX, n=n, **WARM) for n in (1, 2, 5))
    assert alone["choices"] is None
    assert alone["text"] == two["text"] == five["text"]
    assert two["choices"] == five["choices"][:2]
    assert alone["seed"] == five["seed"] == 11


def test_without_sampling_all_answers_are_equal(live: Live) -> None:
    reply = live.generate(prompt=FOX, n=3, max_tokens=12)
    assert [choice["text"] for choice in reply["choices"]] == [live.generate(prompt=FOX, max_tokens=12)["text"]] * 3


def test_each_answer_ends_by_itself(live: Live) -> None:
    whole = live.generate(prompt=FOX, n=4, **WARM)["choices"]
    stop = whole[2]["text"][4:6]
    cut = live.generate(prompt=FOX, n=4, stop=stop, **WARM)
    for one, other in zip(whole, cut["choices"], strict=True):
        place = one["text"].find(stop)
        assert other["text"] == (one["text"] if place < 0 else one["text"][:place])
        assert other["finish_reason"] == ("length" if place < 0 else "stop_sequence")
    assert len({choice["finish_reason"] for choice in cut["choices"]}) == 2, "otherwise the test shows nothing"
    assert cut["usage"]["completion_tokens"] < 4 * 16


def test_every_event_of_a_stream_names_its_answer(live: Live) -> None:
    body = {"prompt": FOX, "n": 3, "logprobs": 0, "echo": True, **WARM}
    whole = live.generate(**body)
    heard = stream(live, **body)
    texts, ends, num_scores = [""] * 3, [0] * 3, [0] * 3
    for name, data in heard:
        index = data["index"]
        assert not ends[index], "no event follows the end of its answer"
        if name == "token":
            texts[index] += data["text"]
            num_scores[index] += len(data["logprobs"]["tokens"])
        else:
            assert name == "done"
            ends[index] += 1
            assert data["finish_reason"] == whole["choices"][index]["finish_reason"]
            assert (data["usage"]["prompt_tokens"], data["usage"]["completion_tokens"]) == (len(FOX), 16)
            assert (data["id"], data["seed"]) == (heard[-1][1]["id"], 11)
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert ends == [1, 1, 1]
    assert num_scores == [len(FOX) + 16] * 3


# --- where it ends


def test_an_answer_may_end_after_its_stop_text(live: Live) -> None:
    whole = live.generate(prompt=FOX, max_tokens=60)["text"]
    stop = whole[30:33]
    place = whole.find(stop)
    for include, expected in ((False, whole[:place]), (True, whole[: place + len(stop)])):
        body = {"prompt": FOX, "max_tokens": 60, "stop": [stop, "never said"], "include_stop": include}
        reply = live.generate(**body)
        assert (reply["text"], reply["finish_reason"]) == (expected, "stop_sequence")
        *tokens, (last, done) = stream(live, **body)
        assert "".join(data["text"] for _, data in tokens) == expected
        assert (last, done["finish_reason"]) == ("done", "stop_sequence")


def test_including_a_stop_text_that_does_not_occur_changes_nothing(live: Live) -> None:
    whole = live.generate(prompt=FOX, max_tokens=20)["text"]
    reply = live.generate(prompt=FOX, max_tokens=20, stop=[whole[-1] + "never"], include_stop=True)
    assert (reply["text"], reply["finish_reason"]) == (whole, "length")


def test_an_answer_does_not_end_before_min_tokens(live: Live) -> None:
    ended = {"prompt": FOX, "max_tokens": 12, "logit_bias": {str(EOS): 100}}
    reply = live.generate(**ended)
    assert (reply["text"], reply["finish_reason"], reply["usage"]["completion_tokens"]) == ("", "stop", 1)
    reply = live.generate(**ended, min_tokens=5)
    assert (len(reply["text"]), reply["finish_reason"], reply["usage"]["completion_tokens"]) == (5, "stop", 6)
    assert reply["text"] == live.generate(prompt=FOX, max_tokens=5)["text"]
    for many in (12, 13, 2**31 - 1):
        reply = live.generate(**ended, min_tokens=many)
        assert (len(reply["text"]), reply["finish_reason"]) == (12, "length")


def test_a_stop_text_does_not_count_before_min_tokens(live: Live) -> None:
    whole = live.generate(prompt=FOX, max_tokens=40)["text"]
    stop = whole[3]
    ends = [place + 1 for place, letter in enumerate(whole) if letter == stop]
    for min_tokens in (0, ends[0], ends[0] + 1, 40):
        reply = live.generate(prompt=FOX, max_tokens=40, stop=stop, min_tokens=min_tokens)
        counted = [end for end in ends if end >= min_tokens]
        assert reply["text"] == (whole[: counted[0] - 1] if counted else whole)


def test_ignoring_the_end_of_text_goes_on(live: Live) -> None:
    reply = live.generate(prompt=FOX, max_tokens=7, logit_bias={str(EOS): 100}, ignore_eos=True)
    assert (reply["text"], reply["finish_reason"], reply["usage"]["completion_tokens"]) == ("", "length", 7)


# --- when


def test_a_request_whose_time_is_up_is_504_and_frees_its_place(live: Live) -> None:
    live.wait_for(running=0, waiting=0)
    refusal = error(live, 504, prompt="long", max_tokens=FOR_EVER, timeout_s=0.05)
    assert (refusal["type"], refusal["param"], refusal["code"]) == ("TimeoutError", None, 504)
    assert refusal["message"] == "not done within 0.05 s"
    live.wait_for(running=0, waiting=0)
    assert live.metric(USAGE) == 0
    assert error(live, 504, prompt="long", max_tokens=FOR_EVER, timeout_s=1e-9, n=3)["code"] == 504
    assert len(live.generate(prompt="x", max_tokens=3, timeout_s=86400)["text"]) == 3


def test_a_stream_whose_time_is_up_ends_with_an_error(live: Live) -> None:
    *_, (last, data) = stream(live, prompt="long", max_tokens=FOR_EVER, timeout_s=0.3, n=2)
    assert last == "error"
    assert (data["error"]["type"], data["error"]["code"]) == ("TimeoutError", 504)
    live.wait_for(running=0, waiting=0)
    assert live.metric(USAGE) == 0


@pytest.mark.slow
def test_lower_priorities_run_earlier(live: Live) -> None:
    """Fill the memory with two requests, so that two more wait. Of these the last has the lower priority, and begins first."""
    live.wait_for(running=0, waiting=0)
    order: list[str] = []
    with ThreadPoolExecutor(4) as pool:

        def ask(name: str, **body: object) -> "Future[dict[str, Any]]":
            future = pool.submit(lambda: live.generate(prompt=name * 3000, **body))
            future.add_done_callback(lambda _: order.append(name))
            return future

        first = [ask(name, max_tokens=900) for name in "ab"]
        live.wait_for(running=2)
        ask("c", max_tokens=600, priority=5)
        live.wait_for(waiting=1)
        ask("d", max_tokens=600, priority=-5)
        wait_until(lambda: all(future.done() for future in first), "the first two requests")
    assert order.index("d") < order.index("c")


def test_timings_are_not_negative_and_add_up(live: Live) -> None:
    for body in ({"max_tokens": 30}, {"max_tokens": 0, "echo": True}, {"max_tokens": 5, "n": 3, "temperature": 1.0}):
        started = time.monotonic()
        timings = live.generate(prompt=FOX, **body)["timings"]
        taken = time.monotonic() - started
        assert set(timings) == {"queue_s", "prefill_s", "decode_s", "time_to_first_token_s", "total_s"}
        assert min(timings.values()) >= 0
        assert timings["queue_s"] + timings["prefill_s"] == pytest.approx(timings["time_to_first_token_s"])
        assert timings["time_to_first_token_s"] + timings["decode_s"] == pytest.approx(timings["total_s"])
        assert 0 < timings["total_s"] <= taken
        *_, (_, done) = stream(live, prompt=FOX, **body)
        assert set(done["timings"]) == set(timings)


def test_cached_tokens_are_reported(live: Live) -> None:
    prompt = "Nobody asked this before, and it is longer than three blocks of sixteen tokens are."
    first, again = (live.generate(prompt=prompt, max_tokens=2)["usage"] for _ in range(2))
    assert first["cached_tokens"] == 0
    assert again == first | {"cached_tokens": len(prompt) // 16 * 16}
    with_adapter = live.generate(prompt=prompt, max_tokens=2, adapter="math")["usage"]
    assert with_adapter["cached_tokens"] == 0, "the adapter makes it another model, with other keys and values"


# --- refusals


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        pytest.param({"prompt": []}, "prompt", "at least 1 item", id="no tokens"),
        pytest.param({"prompt": [1, 2, "a"]}, "prompt.2", "valid integer, found 'a'", id="text among tokens"),
        pytest.param({"prompt": [1, True]}, "prompt.1", "valid integer, found True", id="true among tokens"),
        pytest.param({"prompt": [1, -2]}, "prompt", "has the token -2", id="a negative token"),
        pytest.param({"prompt": [1, 1.5]}, "prompt.1", "found 1.5", id="a fraction among tokens"),
        pytest.param({"prompt": [5, EOS + 1]}, "prompt", "has the token 257, expected 0 to 256", id="an unknown token"),
        pytest.param({"prompt": [1] * 4096}, "prompt", "has 4096 tokens, and the context holds 4096", id="many tokens"),
        pytest.param({"prompt": [1], "template": "chat"}, None, "'template' is for 'messages'", id="template"),
        pytest.param({"n": 0}, "n", "found 0", id="n 0"),
        pytest.param({"n": 65}, "n", "found 65", id="n 65"),
        pytest.param({"top_k": -2}, "top_k", "found -2", id="top_k"),
        pytest.param({"top_p": 0}, "top_p", "found 0", id="top_p 0"),
        pytest.param({"top_p": 1.1}, "top_p", "found 1.1", id="top_p 1.1"),
        pytest.param({"min_p": -0.1}, "min_p", "found -0.1", id="min_p"),
        pytest.param({"repetition_penalty": 0}, "repetition_penalty", "found 0", id="repetition_penalty"),
        pytest.param({"presence_penalty": 2.1}, "presence_penalty", "found 2.1", id="presence_penalty"),
        pytest.param({"frequency_penalty": -2.1}, "frequency_penalty", "found -2.1", id="frequency_penalty"),
        pytest.param({"min_tokens": -1}, "min_tokens", "found -1", id="min_tokens"),
        pytest.param({"min_tokens": 2**31}, "min_tokens", "found 2147483648", id="many min_tokens"),
        pytest.param({"timeout_s": 0}, "timeout_s", "found 0", id="timeout_s"),
        pytest.param({"timeout_s": 1e6}, "timeout_s", "found 1000000", id="a long timeout_s"),
        pytest.param({"priority": 1001}, "priority", "found 1001", id="priority"),
        pytest.param({"priority": 0.5}, "priority", "found 0.5", id="priority is a fraction"),
        pytest.param({"include_stop": 1}, "include_stop", "found 1", id="include_stop"),
        pytest.param({"logit_bias": {"257": 1}}, "logit_bias", "names the token 257, expected 0 to 256", id="bias out of range"),
        pytest.param({"logit_bias": {"a": 1}}, "logit_bias", "found 'a'", id="bias of a letter"),
        pytest.param({"logit_bias": {"-1": 1}}, "logit_bias", "found '-1'", id="bias of a negative token"),
        pytest.param({"logit_bias": {"٣": 1}}, "logit_bias", "found '٣'", id="bias in other digits"),
        pytest.param({"logit_bias": {"5": 101}}, "logit_bias", "found 101", id="bias too large"),
        pytest.param({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "1025, expected at most 1024", id="biases"),
        pytest.param({"logit_bias": [5]}, "logit_bias", "expected an object, found [5]", id="bias is a list"),
        pytest.param({"stop": ["a", 3]}, "stop.1", "valid string, found 3", id="stop.1"),
        pytest.param({"stop": ["a", ""]}, "stop.1", "is empty", id="an empty stop in a list"),
        pytest.param({"top_n": 3}, "top_n", "unknown field", id="unknown field"),
        pytest.param(
            {"top_n": 3, "best_of": 2},
            "top_n",
            "top_n: unknown field: did you mean 'top_k'?; best_of: unknown field: use 'n'",
            id="unknown fields",
        ),
        pytest.param({f"f{i}": 0 for i in range(64)}, None, "too many fields: 65, expected at most 64", id="many unknown fields"),
    ],
)
def test_an_invalid_field_is_refused_by_its_name(live: Live, body: dict[str, Any], param: str | None, message: str) -> None:
    refusal = error(live, **body)
    assert refusal["param"] == param
    assert message in refusal["message"]
    if param:
        assert refusal["message"].startswith(f"{param}: ")


@pytest.mark.parametrize(
    "field", ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "timeout_s"]
)
@pytest.mark.parametrize("number", ["1e999", "-1e999"])
def test_an_infinite_number_is_refused(live: Live, field: str, number: str) -> None:
    content = f'{{"prompt": "x", "{field}": {number}}}'
    reply = live.client.post("/generate", content=content, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == field


def test_many_unknown_fields_inside_a_message_are_one_fault(live: Live) -> None:
    """Regression: each was an error of its own, and a body of a megabyte blocked all clients for a second."""
    many = {f"field {place}": "" for place in range(100)}
    reply = live.client.post("/generate", json={"messages": [{"role": "user", "content": "x"} | many]})
    assert reply.json()["error"]["message"] == "messages.0: too many fields: 102, expected at most 64"
    refusal = error(live, adapter=[{"name": "math", "weight": 1} | many])
    assert refusal["message"] == "adapter.0: too many fields: 102, expected at most 64"
