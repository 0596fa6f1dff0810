"""A service's counts of its requests, and its admission of them."""

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families
from transformers import PreTrainedTokenizerFast

from lori.errors import UnknownAdapterError
from server.access.caller import Caller
from server.engine.adapters.registry import PolicyError, Registry
from server.engine.admission import MAX_LOGPROBS, Admission
from server.engine.engine import Engine
from server.engine.generate_request import GenerateRequest, RefusedError, TokenPrompt
from server.engine.request import DoneEvent, Request, SamplingParams
from server.engine.thread import EngineThread
from server.errors import BusyError
from server.service.service import Service
from server.settings import Settings
from server.telemetry.metrics import Metrics
from tests.server.live import LIMIT_S
from tests.server.registered import registered
from tests.server.rig import FakeEngine, request

LABELS = {"model_name": "fake", "engine": "0"}
ONE, TWO = "1" * 64, "2" * 64


@pytest.mark.parametrize("num_choices", [1, 3])
def test_all_choices_count_but_their_prompt_counts_once(tokenizer: PreTrainedTokenizerFast, num_choices: int) -> None:
    metrics = Metrics("fake")
    engine = EngineThread(cast(Engine, FakeEngine(num_steps=4)))
    service = Service(Settings(), "fake", Registry([]), Admission(tokenizer, Registry([]), 100), engine, metrics)

    async def test() -> None:
        engine.start()
        events = [event async for event in service.generate(request(num_choices=num_choices))]
        assert sum(isinstance(event, DoneEvent) for event in events) == num_choices
        await engine.stop()

    asyncio.run(asyncio.wait_for(test(), LIMIT_S))

    def value(name: str) -> float | None:
        return metrics.registry.get_sample_value(f"vllm:{name}", LABELS)

    assert value("prompt_tokens_total") == 1
    assert value("generation_tokens_total") == 4 * num_choices
    assert value("time_to_first_token_seconds_count") == 1
    assert value("e2e_request_latency_seconds_count") == 1
    ended = metrics.registry.get_sample_value("vllm:request_success_total", {**LABELS, "finished_reason": "length"})
    assert ended == 1


@pytest.fixture
def service(tokenizer: PreTrainedTokenizerFast) -> Service:
    """Return a service with two places and the adapters math and guard."""
    registry = Registry([registered("math", ONE), registered("guard", TWO)])
    admission = Admission(tokenizer, registry, 100, max_terms=3)
    engine = EngineThread(cast(Engine, FakeEngine()))
    metrics = Metrics("fake")
    metrics.watch_adapters(lambda: ["math", "guard"], tuple)
    return Service(Settings(max_requests=2), "fake", registry, admission, engine, metrics)


def run(service: Service, test: Coroutine[object, object, None]) -> None:
    async def running() -> None:
        service.engine.start()
        await test
        await service.engine.stop()

    asyncio.run(asyncio.wait_for(running(), LIMIT_S))


def asked(service: Service, name: str) -> float:
    families = text_string_to_metric_families(service.metrics.text().decode())
    samples = [s for f in families for s in f.samples if s.name == "lori:adapter_requests_total"]
    return sum(sample.value for sample in samples if sample.labels["adapter"] == name)


def using(service: Service) -> list[tuple[int, int]]:
    uses = [service.uses.get(name, digest) for name, digest in (("math", ONE), ("guard", TWO))]
    return [(use.num_using, use.num_requests) for use in uses]


MATH = GenerateRequest(prompt="x", adapters=("math",))


def test_requests_use_their_adapters_while_they_have_their_places(service: Service) -> None:
    async def test() -> None:
        async with service.admitted([MATH, MATH], Caller(tenant="they", policy=(("guard", 1.0),))) as (one, _):
            assert [term.name for term in (*one.terms, *one.policy)] == ["math", "guard"]
            assert service.num_requests == 2
            assert using(service) == [(2, 2), (2, 2)]
            with pytest.raises(BusyError, match="2 requests are under way"):
                async with service.admitted([MATH], Caller(tenant="they")):
                    pass
        assert service.num_requests == 0
        assert using(service) == [(0, 2), (0, 2)]
        assert (asked(service, "math"), asked(service, "guard")) == (2, 2)

    run(service, test())


def test_if_all_places_are_taken_a_tenant_without_one_still_gets_one(service: Service) -> None:
    """Regression: one tenant kept all others out by sending more requests than the server has places."""

    async def test() -> None:
        they, we = Caller(tenant="they"), Caller(tenant="we")
        async with service.admitted([MATH, MATH], they), service.admitted([MATH], we):
            assert service.num_requests == 3
            for asks, caller in ([MATH], we), ([MATH, MATH], Caller(tenant="others")):
                with pytest.raises(BusyError, match="3 requests are under way"):
                    async with service.admitted(asks, caller):
                        pass

    run(service, test())


@pytest.mark.parametrize(
    "refused", [GenerateRequest(prompt="x", adapters=("nobody",)), GenerateRequest(prompt="x" * 200), GenerateRequest(prompt="")]
)
def test_if_one_of_several_requests_is_refused_none_counts(service: Service, refused: GenerateRequest) -> None:
    async def test() -> None:
        with pytest.raises((UnknownAdapterError, RefusedError)):
            async with service.admitted([MATH, refused], Caller()):
                pass
        assert service.num_requests == 0
        assert using(service) == [(0, 0), (0, 0)]
        assert asked(service, "math") == 0

    run(service, test())


class Withdrawing:
    """A fake admission that withdraws an adapter after the last request."""

    def __init__(self, service: Service, name: str) -> None:
        self._admission, self._registry, self._name = service.admission, service.registry, name

    def admit(self, ask: GenerateRequest) -> Request:
        admitted = self._admission.admit(ask)
        if "last" in str(ask.prompt):
            self._registry.withdraw(self._name)
        return admitted


@pytest.mark.parametrize(
    ("name", "expected", "message"),
    [
        ("math", UnknownAdapterError, "there is no adapter 'math@111111111111': known are 'guard'"),
        ("guard", PolicyError, "the operator's adapters cannot be added"),
    ],
)
def test_an_adapter_withdrawn_during_admission_is_refused_and_nothing_counts(
    service: Service, name: str, expected: type[Exception], message: str
) -> None:
    async def test() -> None:
        service.admission = cast(Any, Withdrawing(service, name))
        with pytest.raises(expected, match=message):
            async with service.admitted([MATH, GenerateRequest(prompt="last")], Caller(policy=(("guard", 1.0),), tenant="they")):
                pass
        assert service.num_requests == 0
        assert using(service) == [(0, 0), (0, 0)]
        assert asked(service, "math") == 0

    run(service, test())


@pytest.mark.slow
def test_the_log_probabilities_of_prompts_in_a_reply_are_bounded(tokenizer: PreTrainedTokenizerFast) -> None:
    engine, metrics = EngineThread(cast(Engine, FakeEngine())), Metrics("fake")
    admission = Admission(tokenizer, Registry([]), MAX_LOGPROBS)
    service = Service(Settings(max_requests=2), "fake", Registry([]), admission, engine, metrics)
    length = MAX_LOGPROBS // 2**5
    ask = GenerateRequest(
        prompt=TokenPrompt((1,) * length), sampling=SamplingParams(echo=True, num_logprobs=7, num_choices=2), max_tokens=0
    )

    async def test() -> None:
        async with service.admitted([ask, ask], Caller()):
            pass
        for more in (
            replace(ask, sampling=replace(ask.sampling, num_logprobs=8)),
            replace(ask, sampling=replace(ask.sampling, num_choices=3)),
            replace(ask, prompt=TokenPrompt((1,) * (length + 1))),
        ):
            with pytest.raises(RefusedError, match=f"expected at most {MAX_LOGPROBS} in one reply") as caught:
                async with service.admitted([ask, more], Caller()):
                    pass
            assert caught.value.field == "logprobs"
            async with service.admitted([replace(more, sampling=replace(more.sampling, echo=False), max_tokens=1)], Caller()):
                pass
        assert service.num_requests == 0

    run(service, test())


def test_the_log_probabilities_of_answers_in_a_whole_reply_are_bounded(tokenizer: PreTrainedTokenizerFast) -> None:
    """Bound them, since 64 answers that fill a long context, with 20 alternatives a token, are gigabytes."""
    engine, metrics = EngineThread(cast(Engine, FakeEngine())), Metrics("fake")
    service = Service(Settings(), "fake", Registry([]), Admission(tokenizer, Registry([]), MAX_LOGPROBS), engine, metrics)
    ask = GenerateRequest(prompt="x", sampling=SamplingParams(num_logprobs=7, num_choices=2), max_tokens=MAX_LOGPROBS // 16)
    more = replace(ask, sampling=replace(ask.sampling, num_choices=3))

    async def test() -> None:
        async with service.admitted([ask], Caller()):
            pass
        with pytest.raises(RefusedError, match=f"expected at most {MAX_LOGPROBS} in one reply; a stream holds more") as caught:
            async with service.admitted([more], Caller()):
                pass
        assert caught.value.field == "logprobs"
        async with service.admitted([more], Caller(), is_whole=False):
            pass
        async with service.admitted([replace(more, sampling=replace(more.sampling, num_logprobs=None))], Caller()):
            pass

    run(service, test())
