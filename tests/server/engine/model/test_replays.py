"""Replays of decoding steps of fixed shapes: their outputs equal those of eager steps."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lori.projection
from lori.base_model import BaseModel
from lori.kernels import Route, Weight, gpu
from server.engine.generate_request import GenerateRequest
from server.engine.model.cuda_graphs import TERMS, Replays
from server.engine.model.runner import Runner
from server.engine.model.triton_ops import GpuOps
from server.engine.request import Chunk, SamplingParams
from server.engine.request import Sequence as EngineSequence
from tests.interpreter import INTERPRETED
from tests.server.replayed import Recorder, Tape, pretend_gpu
from tests.server.rig import Heard, Rig, build, request, write_adapter

pytestmark = list(INTERPRETED)

FOX = "The quick brown fox jumps over the lazy dog."
ASKS = [
    GenerateRequest(prompt=FOX, max_tokens=14),
    GenerateRequest(prompt=FOX, max_tokens=12, adapters=("math",), sampling=SamplingParams(num_logprobs=2)),
    GenerateRequest(prompt=FOX[:17], max_tokens=7, adapters=("math", "safety"), weights=(1.0, -0.5)),
    GenerateRequest(prompt=FOX[:3], max_tokens=9, adapters=("intent",), sampling=SamplingParams(num_logprobs=0)),
    GenerateRequest(prompt=FOX[5:], max_tokens=5, adapters=("safety",)),
]
JOINS = [0, 1, 3, 3, 6]


def values(heard: Heard) -> list[float | None]:
    return [one.value for one in heard.logprobs]


def assert_alike(actual: Sequence[Heard], expected: Sequence[Heard]) -> None:
    assert [heard.tokens for heard in actual] == [heard.tokens for heard in expected]
    for one, other in zip(actual, expected, strict=True):
        assert values(one) == pytest.approx(values(other), abs=1e-4)


@pytest.mark.parametrize("block_size", [1, 16])
def test_replayed_steps_give_the_outputs_of_a_cpu(
    block_size: int, writer_model: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch, its adapters and their merges change from step to step. With blocks of one token the table grows on the way."""
    sizes = {"max_step_tokens": 64, "block_size": block_size, "num_blocks": 512}
    expected = build(writer_model, adapters, **sizes).run(ASKS, JOINS)
    recorder = pretend_gpu(monkeypatch)
    rig = build(writer_model, adapters, **sizes)
    assert_alike(rig.run(ASKS, JOINS), expected)
    assert recorder.num_replayed >= 10


def test_scarce_memory_changes_nothing(writer_model: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are preempted, and resume with other blocks."""
    sizes = {"max_step_tokens": 64, "block_size": 4, "num_blocks": 26}
    expected = build(writer_model, adapters, **sizes).run(ASKS, JOINS)
    recorder = pretend_gpu(monkeypatch)
    rig = build(writer_model, adapters, **sizes)
    assert_alike(rig.run(ASKS, JOINS), expected)
    assert rig.scheduler.num_preemptions > 0
    assert recorder.num_replayed >= 10


def test_replays_read_adapters_with_the_kernel_of_a_gpu(
    writer_model: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters come and go between the steps: in the only slot, each request's adapter replaces the one before."""
    asks = [replace(ask, prompt=ask.prompt[:4], max_tokens=3) for ask in ASKS if len(ask.adapters) == 1]
    alone = [build(writer_model, adapters).run([ask])[0] for ask in asks]
    recorder = pretend_gpu(monkeypatch, kernel="gpu")
    rig = build(writer_model, adapters, num_slots=1)
    assert_alike([rig.run([ask])[0] for ask in asks], alone)
    assert recorder.num_replayed == 2 * len(asks)


# --- single steps


class Steps:
    """Steps of two runners on the same sequences: one replays as on a GPU, the other computes on the CPU."""

    def __init__(self, folder: Path, adapters: Path | None, monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
        self.plain = build(folder, adapters, **sizes)
        self.recorder = pretend_gpu(monkeypatch, kernel="gpu")
        self.rig = build(folder, adapters, **sizes)
        for rig in (self.plain, self.rig):
            for slot, name in enumerate(rig.adapters):
                put(rig, slot, name)
        self.block_size = sizes.get("block_size", 16)
        self.num_blocks_used = 0

    def start(self, num_tokens: int, *terms: tuple[int, Weight]) -> EngineSequence:
        """Return a sequence with the keys of its first `num_tokens` tokens, and blocks for as many more tokens and 16."""
        blocks = range(self.num_blocks_used, self.num_blocks_used + 1 + (2 * num_tokens + 16) // self.block_size)
        self.num_blocks_used = blocks.stop
        sequence = EngineSequence(request(num_tokens), output_ids=[7], blocks=[*blocks], terms=[*terms])
        for rig in (self.plain, self.rig):
            rig.runner.forward([Chunk(sequence, 0, num_tokens)], [])
        return sequence

    def check(self, *sequences: EngineSequence) -> None:
        """Decode the last token of each sequence, compare both runners' logits, and append a token."""
        chunks = [Chunk(sequence, sequence.num_tokens - 1, sequence.num_tokens) for sequence in sequences]
        rows = range(len(chunks))
        expected, actual = (rig.runner.forward(chunks, rows) for rig in (self.plain, self.rig))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=5e-5)
        for sequence in sequences:
            sequence.output_ids.append(len(sequence.output_ids) * 13 % 256)


def put(rig: Rig, slot: int, name: str) -> None:
    """Make an adapter resident without the adapter cache."""
    adapter_cache = rig.engine.adapter_cache
    adapter_cache._pool.put(slot, adapter_cache._loader._reader.read_entry(rig.registry.by_name[name].entry))


def replays_of(rig: Rig) -> Replays:
    replays = rig.runner._replays
    assert replays is not None
    return replays


def test_steps_of_every_size(writer_model: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(writer_model, adapters, monkeypatch, max_batch=9)
    sequences = [steps.start(1 + 5 * i, *[(i % 3, 0.5 + i)] * (i % 4 > 0)) for i in range(9)]
    for count in (1, 9, 3, 2, 4, 7):
        steps.check(*sequences[:count])
    steps.check(*sequences[:4:-1])  # in other rows
    assert steps.recorder.num_replayed == 8  # the prompt of one token is a replay, too
    assert steps.recorder.num_recorded == replays_of(steps.rig).num_recorded == 5  # for 1, 16, 4, 2 and 8 rows


def test_a_sequence_grows_over_all_strides_of_the_table(writer_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(writer_model, None, monkeypatch, block_size=1, num_blocks=400)
    long, short = steps.start(60), steps.start(2)
    for _ in range(3):
        steps.check(short)
        steps.check(long, short)
    for _ in range(6):
        steps.check(short)
    assert steps.recorder.num_recorded == 2


def test_rows_that_pad_a_step_touch_no_block_of_a_sequence(writer_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(writer_model, None, monkeypatch, num_blocks=8)
    sequences = [steps.start(3) for _ in range(3)]
    ops = steps.rig.runner._ops
    assert isinstance(ops, GpuOps)
    memory = ops._memory.unflatten(2, (-1, 16))  # (layers, 2, blocks, 16, G, E)
    assert memory.shape[2] == 9
    before = memory.clone()
    steps.check(*sequences)
    is_changed = (memory != before).flatten(4).any(-1).any(0).any(0).nonzero().tolist()
    assert is_changed == [[sequence.blocks[0], 3] for sequence in sequences] + [[ops.spare_block, 0]]


def test_memory_that_holds_no_key_of_a_sequence_is_not_read(writer_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(writer_model, None, monkeypatch, num_blocks=12)
    ops = steps.rig.runner._ops
    assert isinstance(ops, GpuOps)
    ops._memory.fill_(torch.nan)
    sequences = [steps.start(20), steps.start(1), steps.start(16)]
    for _ in range(3):
        steps.check(*sequences)


def test_when_the_pool_moves_steps_are_recorded_anew(
    writer_model: Path, writer: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seed in (("a", 5), ("b", 6)):
        write_adapter(tmp_path / name, writer, seed=seed)
    steps = Steps(writer_model, tmp_path, monkeypatch)
    sequence = steps.start(4, (0, 1.0))
    steps.check(sequence)
    steps.check(sequence)
    assert steps.recorder.num_recorded == 1
    num_starts, num_moves = steps.recorder.num_starts, steps.rig.engine.adapter_cache._pool.num_moves
    for rig in (steps.plain, steps.rig):
        put(rig, 2, "b")
        put(rig, 3, "b")
        put(rig, 4, "a")
    assert steps.rig.engine.adapter_cache._pool.num_moves > num_moves
    for slot in (0, 4, 3):
        sequence.terms = [(slot, 1.5)]
        steps.check(sequence)
    assert steps.recorder.num_recorded == 2
    assert steps.recorder.num_starts == num_starts + 1
    assert replays_of(steps.rig).num_recorded == 1


def test_a_replay_reads_the_adapter_that_replaced_another_in_its_slot(
    writer_model: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(writer_model, adapters, monkeypatch)
    sequence = steps.start(4, (0, 1.0))
    steps.check(sequence)
    for rig in (steps.plain, steps.rig):
        rig.engine.adapter_cache._pool.clear(2)
        put(rig, 0, "safety")
    steps.check(sequence)
    assert steps.recorder.num_recorded == 1


def test_a_replay_takes_each_layer_s_weights(writer_model: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(writer_model, adapters, monkeypatch)
    merged, other = steps.start(4, (0, (1.5, -0.5)), (1, 0.5)), steps.start(3, (2, 1.0))
    steps.check(merged, other)
    merged.terms = [(0, 1.5), (1, (0.0, 2.0))]
    steps.check(merged, other)
    merged.terms = [(1, 1.0)]
    steps.check(merged, other)
    assert steps.recorder.num_recorded == 1


def test_a_step_with_too_many_terms_is_not_replayed(writer_model: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(writer_model, adapters, monkeypatch)
    many = [(i % 3, 0.1 + i) for i in range(TERMS + 1)]
    one, other = steps.start(4, *many), steps.start(3)
    steps.check(one)
    assert steps.recorder.num_replayed == 0
    steps.check(one, other)  # the limit is for the terms of all rows together
    assert steps.recorder.num_replayed == 1


def test_steps_with_prompts_or_with_too_many_rows_are_not_replayed(writer_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(writer_model, None, monkeypatch, max_batch=2)
    sequences = [steps.start(3) for _ in range(3)]
    steps.check(*sequences)
    mixed = [Chunk(sequences[0], 4, 5), Chunk(sequences[1], 0, 4)]
    expected, actual = (rig.runner.forward(mixed, range(5)) for rig in (steps.plain, steps.rig))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=5e-5)
    assert steps.recorder.num_replayed == 0


def test_the_next_step_does_not_overwrite_logits_of_rows_in_any_order(
    writer_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(writer_model, None, monkeypatch)
    chunks = [Chunk(steps.start(count), count, count + 1) for count in (2, 5, 9)]
    expected = steps.plain.runner.forward(chunks, [2, 0])
    actual = steps.rig.runner.forward(chunks, [2, 0])
    steps.rig.runner.forward(chunks[1:], [0, 1])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=5e-5)
    assert steps.rig.runner.forward(chunks, []).shape == (0, 257)


def test_nothing_is_replayed_before_the_runner_is_prepared(writer_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step costs are measured before `prepare`, while all steps are computed in the same way."""
    recorder = pretend_gpu(monkeypatch)
    monkeypatch.setattr(Runner, "_can_replay", False)
    rig = build(writer_model, max_batch=1)
    ask = GenerateRequest(prompt=FOX, max_tokens=4)
    (before,) = rig.run([ask])
    assert recorder.num_replayed == 0
    rig.runner.prepare()
    (after,) = rig.run([ask])
    assert recorder.num_replayed > 1
    assert after.tokens == before.tokens


@pytest.mark.parametrize("has_adapters", [False, True])
def test_all_sizes_are_recorded_before_the_first_request(
    has_adapters: bool, writer_model: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = pretend_gpu(monkeypatch)
    rig = build(writer_model, adapters if has_adapters else None, max_batch=5)
    rig.runner.prepare()
    assert recorder.num_recorded == recorder.num_replayed == 4 * (1 + has_adapters)
    if has_adapters:  # the pool has not moved by then: it is reserved at start
        monkeypatch.setattr(type(rig.engine.adapter_cache._pool), "num_moves", 0)
    rig.run([GenerateRequest(prompt=FOX, max_tokens=4, adapters=("math",) * has_adapters) for _ in range(3)])
    assert recorder.num_recorded == 4 * (1 + has_adapters)


def test_a_runner_on_a_cpu_has_nothing_to_prepare(writer_model: Path) -> None:
    rig = build(writer_model)
    rig.runner.prepare()
    assert rig.runner._replays is None


def test_eager_steps_read_nothing_back_from_the_device(
    writer_model: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checked as far as a CPU can: prompts of several adapters, one so long that its deltas are dense, beside a decoding row."""
    steps = Steps(writer_model, adapters, monkeypatch)
    monkeypatch.setattr(lori.projection, "add_delta", gpu.add_delta)
    decodes, dense, merged = steps.start(4, (0, 1.0)), steps.start(1, (1, 1.0)), steps.start(1, (0, 0.5), (2, 1.0))
    decodes.request, dense.request = request(4), request(gpu.DENSE_TOKENS)
    dense.blocks = [*range(8, 12)]
    chunks = [Chunk(decodes, 4, 5), Chunk(merged, 0, 1), Chunk(dense, 0, gpu.DENSE_TOKENS)]
    expected = steps.plain.runner.forward(chunks, [0, 9])
    monkeypatch.setattr(torch.Tensor, "tolist", lambda _: pytest.fail("numbers are read back"))
    with Tape():
        actual = steps.rig.runner.forward(chunks, [0, 9])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=5e-5)
    assert isinstance(steps.rig.runner._cached_route.route, Route)
    plan = steps.rig.runner._cached_route.route.gpu["plan"]
    assert isinstance(plan, gpu.Plan)
    assert len(plan.tiles) == 1


@pytest.mark.parametrize(
    ("message", "is_broken"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("Triton Error [CUDA]: an illegal memory access was encountered", True),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", False),
        ("no", False),
    ],
)
def test_an_illegal_memory_access_breaks_the_runner(message: str, is_broken: bool, writer_model: Path) -> None:
    assert build(writer_model).runner.is_broken(RuntimeError(message)) == is_broken


def test_a_step_that_waits_for_the_device_cannot_be_recorded() -> None:
    """The tape of these tests is as strict as a CUDA graph."""
    x = torch.ones(3)
    waits: list[Callable[[], object]] = [lambda: x.sum().item(), x.nonzero, lambda: x[x > 0], lambda: bool(x[0]), x.unique]
    for wait in waits:
        with pytest.raises(AssertionError, match="waits for the device"):
            Recorder().record(lambda wait=wait: wait())
