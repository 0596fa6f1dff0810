"""The engine on a GPU: its answers, replays, a single wait for the device in each step, and its memory.

The parts that run without a GPU are tested by `test_replays` and `test_paged_attention`.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal

import pytest
import torch

from server.engine import step as step_module
from server.engine.generate_request import GenerateRequest
from server.engine.model.cuda_graphs import Replays
from server.engine.request import SamplingParams
from server.engine.step import read_back
from server.loading import load_service
from server.settings import GIB, Settings
from tests.server.rig import Heard, Rig, build, rig_of

pytestmark = pytest.mark.gpu

FOX = "The quick brown fox jumps over the lazy dog, and then it sleeps. "
DRAWN = SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.1)
ASKS = [
    GenerateRequest(prompt=FOX, max_tokens=40),
    GenerateRequest(prompt=FOX, max_tokens=30, adapters=("math",), sampling=SamplingParams(num_logprobs=2)),
    GenerateRequest(prompt=FOX[:17], max_tokens=20, adapters=("math", "safety"), weights=(1.0, -0.5)),
    GenerateRequest(prompt=FOX[:3], max_tokens=35, adapters=("intent",), sampling=SamplingParams(num_logprobs=0, echo=True)),
    GenerateRequest(prompt=FOX * 4, max_tokens=25, adapters=("safety",)),
    GenerateRequest(prompt=FOX[5:], max_tokens=30, adapters=("math",), sampling=replace(DRAWN, seed=3)),
]
JOINS = [0, 1, 3, 3, 6, 10]
Flags = Literal["float32", "bfloat16"]


def replays_of(rig: Rig) -> Replays:
    replays = rig.runner._replays
    assert replays is not None
    return replays


def values(heard: Heard) -> list[float | None]:
    return [one.value for one in heard.logprobs]


def assert_alike(actual: Sequence[Heard], expected: Sequence[Heard]) -> None:
    assert [heard.tokens for heard in actual] == [heard.tokens for heard in expected]
    for one, other in zip(actual, expected, strict=True):
        assert values(one) == pytest.approx(values(other), abs=1e-3)


def test_a_mixed_batch_in_fp32_has_the_answers_of_a_cpu(writer_model: Path, adapters: Path) -> None:
    expected = build(writer_model, adapters, max_step_tokens=48).run(ASKS, JOINS)
    rig = build(writer_model, adapters, max_step_tokens=48, device="cuda:0")
    assert_alike(rig.run(ASKS, JOINS), expected)
    assert replays_of(rig).num_recorded > 1


def test_a_mixed_batch_in_fp32_has_the_answers_of_each_request_alone(writer_model: Path, adapters: Path) -> None:
    rig = build(writer_model, adapters, max_step_tokens=48, device="cuda:0")
    alone = [rig.run([ask])[0] for ask in ASKS]
    assert_alike(rig.run(ASKS, JOINS), alone)


def test_scarce_memory_changes_nothing(writer_model: Path, adapters: Path) -> None:
    sizes = {"max_step_tokens": 48, "num_blocks": 34}
    expected = build(writer_model, adapters, **sizes).run(ASKS, JOINS)
    rig = build(writer_model, adapters, **sizes, device="cuda:0")
    assert_alike(rig.run(ASKS, JOINS), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_compute_the_logits_of_eager_steps(writer_model: Path, adapters: Path, dtype: torch.dtype) -> None:
    """Equal to the bit where the sizes are those of the steps. A padded product may use a kernel with another order of sums."""
    sizes = {"max_step_tokens": 48, "dtype": dtype, "device": "cuda:0"}
    asks = [GenerateRequest(prompt=FOX[i:], max_tokens=40, adapters=("math", "safety")[: i % 3]) for i in range(8)]
    eager = build(writer_model, adapters, **sizes, max_replayed=0)  # type: ignore[arg-type]
    rig = build(writer_model, adapters, **sizes)  # type: ignore[arg-type]
    for one in (eager, rig):
        for ask in asks:
            one.ask(ask)
        while len(one.scheduler.running) < len(asks) or any(s.num_computed < s.num_tokens - 1 for s in one.scheduler.running):
            one.step_on()
    assert eager.runner._replays is None
    for _ in range(5):
        logits = []
        for one in (eager, rig):
            chunks = one.scheduler.plan()
            assert all(chunk.stop - chunk.start == 1 for chunk in chunks)
            logits.append(one.runner.forward(chunks, range(len(chunks))))
        tolerance = 1e-4 if dtype is torch.float32 else 0.1
        torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=tolerance)
        for one in (eager, rig):
            one.step()
    for one in (eager, rig):
        one.finish()


def test_when_the_pool_moves_steps_are_recorded_anew(writer_model: Path, adapters: Path) -> None:
    """The pool has no room at first. It moves when the second adapter comes, while the request of the first goes on."""
    asks = [
        GenerateRequest(prompt=FOX, max_tokens=40, adapters=("math",)),
        GenerateRequest(prompt=FOX, max_tokens=20, adapters=("safety",)),
    ]
    expected = build(writer_model, adapters).run(asks, [0, 15])
    rig = build(writer_model, adapters, device="cuda:0")
    assert_alike(rig.run(asks, [0, 15]), expected)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Make it an error to wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("max_replayed", [0, 8])
def test_a_step_waits_for_the_device_once(
    writer_model: Path, adapters: Path, max_replayed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without prompts, for requests with sampling, scores and logits processors."""
    num_read = 0

    def read(tensors: Sequence[torch.Tensor]) -> list[list[list[float]]]:
        nonlocal num_read
        num_read += 1
        torch.cuda.set_sync_debug_mode("default")
        values = read_back(tensors)
        torch.cuda.set_sync_debug_mode("error")
        return values

    rig = build(writer_model, adapters, max_step_tokens=48, device="cuda:0", max_replayed=max_replayed)
    rig.run(ASKS, JOINS)  # makes the adapters resident, and compiles the kernels
    rig.runner.prepare()
    monkeypatch.setattr(step_module, "read_back", read)
    for ask in ASKS:
        rig.ask(ask)
    num_steps = 0
    while rig.scheduler.has_work:
        with no_waiting():
            rig.step()
        num_steps += 1
    assert num_read == num_steps > 30


def test_an_adapter_is_put_without_waiting(writer_model: Path, adapters: Path) -> None:
    rig = build(writer_model, adapters, device="cuda:0")
    adapter_cache = rig.engine.adapter_cache
    packed = [adapter_cache._loader._reader.read_entry(adapter.entry) for adapter in islice(rig.registry.by_name.values(), 2)]
    adapter_cache._pool.reserve(2**20)
    with no_waiting():
        for slot, adapter in enumerate(packed):
            adapter_cache._pool.put(slot, adapter)
        adapter_cache._pool.clear(0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_service_on_a_gpu_keeps_to_its_budgets(
    dtype: Flags, writer_model: Path, adapters: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    kv_cache_gib, resident_gib = 0.01, 0.02
    service = load_service(
        Settings(
            model=str(writer_model), adapters=adapters, device="cuda", dtype=dtype, kv_cache_gib=kv_cache_gib,
            resident_gib=resident_gib, max_batch=8,
        )
    )  # fmt: skip
    assert " on cuda:0 (" in caplog.text
    assert "attention in Triton, deltas in Triton" in caplog.text
    rig = rig_of(service)
    assert rig.runner.num_kv_bytes <= kv_cache_gib * GIB
    assert rig.engine.adapter_cache._pool.num_bytes <= resident_gib * GIB + 2**20  # and the table of the adapters' places
    num_recorded = replays_of(rig).num_recorded
    assert num_recorded == 2 * 4  # for 1, 2, 4 and 8 rows, with adapters and without
    rig.run(ASKS, JOINS)
    before = torch.cuda.memory_allocated()
    rig.run(ASKS, JOINS)
    assert torch.cuda.memory_allocated() <= before + 2**20, "steps leave no memory allocated"
    assert replays_of(rig).num_recorded == num_recorded, "no request waits for a recording"


def test_auto_chooses_the_gpu(writer_model: Path) -> None:
    service = load_service(Settings(model=str(writer_model), kv_cache_gib=0.01, max_batch=2))
    runner = rig_of(service).runner
    assert runner._device == torch.device("cuda", 0)
    assert runner._dtype is torch.bfloat16
