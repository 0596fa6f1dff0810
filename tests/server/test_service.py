"""What a service counts of its requests."""

import asyncio
from typing import cast

import pytest
from transformers import PreTrainedTokenizerFast

from server.engine.adapters.registry import Registry
from server.engine.admission import Admission
from server.engine.engine import Engine
from server.engine.request import DoneEvent
from server.engine.thread import EngineThread
from server.metrics import Metrics
from server.service import Service
from server.settings import Settings
from tests.server.live import LIMIT_S
from tests.server.rig import FakeEngine, request

LABELS = {"model_name": "fake", "engine": "0"}


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
