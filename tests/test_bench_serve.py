"""The benchmark of the server: it sends, counts, judges and plots. The tests do not check its figures."""

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from lori.base_identity import identify_files
from lori.base_model import load_base_model
from lori.format import load_adapter
from lori.native import MAX_ISA_VARIABLE
from lori.store.store import AdapterStore
from tests.bench.random_model import SHAPES, write_model
from tests.bench.serve_adapters import DENSITY, adapter_name, export_adapters, write_adapters
from tests.bench.serve_asks import Ask, distinct, make_asks, no_adapter, poisson, prompt, zipf
from tests.bench.serve_cases import CONCURRENCY, NUM_DISTINCT, Trial, names, own_cases, peer_cases, trials
from tests.bench.serve_figures import Spread, gaps_ms, percentile
from tests.bench.serve_goals import MOST, goals
from tests.bench.serve_load import Load, closed_loop, open_loop
from tests.bench.serve_plot import plot
from tests.bench.serve_probes import Sizes, largest_gap, probe_long
from tests.bench.serve_results import COLUMNS, Results, cells
from tests.bench.serve_run import OPEN, Plan
from tests.bench.serve_stage import Setting, Stage, missing_peers, staged
from tests.bench.serve_targets import start_batches
from tests.bench.serve_wire import FailedError, Reply, ask
from tests.server.rig import save_writer_model

TINY = Sizes(prompt_words=12, num_tokens=6, long_words=60, others_tokens=3900, num_pairs=2, num_arrivals=6, settle_s=0.05)


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model that never ends its answers."""
    return save_writer_model(tmp_path_factory.mktemp("models") / "writer")


@pytest.fixture(scope="module")
def stage(writer: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Yield a stage of real servers with and without adapters. Both servers end with it."""
    setting = Setting([0], tmp_path_factory.mktemp("scratch"), writer, num_registered=40, num_cold=8)
    with staged(setting) as stage:
        yield stage
        programs = [target.program.process for target in stage.targets.values()]
    assert all(program.poll() is not None for program in programs)
    assert not stage.adapters.exists()


@pytest.fixture(scope="module")
def results(stage: Stage) -> Results:
    """Return the results of two rounds of the servers' cases, for few users, over sockets."""
    chosen = [Trial(case, 4) for case in own_cases(40) if case.slug in ("off", "unused", "1", "merge2", "blocks2", "zipf")]
    chosen += [Trial(case, NUM_DISTINCT) for case in own_cases(40) if case.slug == str(NUM_DISTINCT)]
    plan = Plan(chosen, ["open", "cold", "long"], TINY, num_warm=4)
    ticks: list[str] = []
    results = plan.run(stage, 2, ticks.append)
    assert len(stage.targets) == 2
    assert len(ticks) == 2 * plan.size
    return results


@pytest.mark.slow
def test_a_row_has_every_figure(results: Results) -> None:
    rows = {(row.case, row.concurrency): row for row in results.rows()}
    assert len(rows) == 8
    assert all(row.tokens_per_s > 0 and row.ttft_p50 and row.itl_p99 for row in rows.values())
    assert rows["LoRI off", 4].ratio == 1
    assert rows["1 adapter", 4].ratio is not None
    assert rows["zipf of 40", 4].adapters == 40
    assert rows["32 merges of 2", 4].terms == 2
    assert all(len(cells(row)) == len(COLUMNS) for row in rows.values())


@pytest.mark.slow
def test_every_request_generates_what_was_asked(results: Results) -> None:
    for trial, loads in results.loads.items():
        num_requests = TINY.num_arrivals if trial == OPEN else trial.num_requests
        for load in loads:
            assert [reply.num_completion for reply in load.replies] == [TINY.num_tokens] * num_requests
            assert all(len(reply.times) == TINY.num_tokens for reply in load.replies)


@pytest.mark.slow
def test_only_goals_with_measured_cases_are_judged(results: Results) -> None:
    judged = {goal.what: goal for goal in goals(results, 10**6)}
    assert set(MOST) <= judged.keys()
    assert "LoRI on, unused / off" not in judged  # not measured with 32 users
    assert "open loop: p99 / p50 between tokens" in judged
    assert all(str(goal).startswith(("met ", "missed ")) for goal in judged.values())


def test_ratios_are_computed_within_a_round() -> None:
    results = Results()
    speeds = {"off": [100, 50, 10], str(NUM_DISTINCT): [95, 45, 9.5], "vllm-off": [50, 50, 50]}
    for case in [*own_cases(100), *peer_cases()]:
        for speed in speeds.get(case.slug, []):
            results.loads[Trial(case, NUM_DISTINCT)].append(load_of(speed))
    judged = {goal.what: goal for goal in goals(results, 10**6)}
    assert judged["32 adapters / none"].value == Spread(0.95, 0.9, 0.95)
    assert judged["32 adapters / none"].is_met
    assert judged["base / vLLM's base"].value.median == 1
    assert results.rows()[0].tokens_per_s == 50


def test_one_user_is_compared_with_the_bandwidth_bound() -> None:
    results = Results()
    results.loads[Trial(own_cases(1)[0], 1)].append(load_of(60))
    results.bandwidths.append(10e9)
    (goal, _) = goals(results, 10**8)
    assert goal.value.median == pytest.approx(0.6)
    assert not goal.is_met


def load_of(tokens_per_s: float) -> Load:
    """Return a load of one reply at the given speed."""
    return Load(1 / tokens_per_s, [Reply(asked=0.0, times=[1.0, 2.0], ended=2.0, num_prompt=5, num_completion=1)])


def test_percentiles_are_measured_values() -> None:
    values = [float(i) for i in range(1, 101)]
    random.Random(0).shuffle(values)
    assert [percentile(values, p) for p in (0, 1, 50, 95, 99, 100)] == [1, 1, 50, 95, 99, 100]
    assert percentile([7.0], 99) == 7
    assert percentile([], 50) is None


def test_zipf_popularity_is_inversely_proportional_to_rank() -> None:
    choose = zipf(names(1000), "seed")
    counts = Counter(choose(i)[0] for i in range(20_000))
    harmonic = sum(1 / k for k in range(1, 1001))
    for rank in (1, 2, 5):
        assert counts[adapter_name(rank - 1)] == pytest.approx(20_000 / rank / harmonic, rel=0.1)
    first, second = zipf(names(1000), "seed"), zipf(names(1000), "seed")
    assert [first(i) for i in range(50)] == [second(i) for i in range(50)]


def test_poisson_arrivals_have_their_rate_and_no_memory() -> None:
    arrivals = poisson(5.0, 20_000, "seed")
    gaps = [after - before for before, after in itertools.pairwise([0.0, *arrivals])]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.2, rel=0.03)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.05)
    assert min(gaps) > 0
    assert arrivals == poisson(5.0, 20_000, "seed") != poisson(5.0, 20_000, "another")


def test_prompts_share_no_prefix_and_have_the_same_lengths_in_every_case() -> None:
    one, other = (make_asks(seed, 32, 100, 64, no_adapter) for seed in ("one", "other"))
    assert len({ask.prompt[:60] for ask in one + other}) == 64
    lengths = [[len(ask.prompt.split()) for ask in asks] for asks in (one, other)]
    assert lengths[0] == lengths[1]
    assert len(set(lengths[0])) > 10
    assert all(90 <= length <= 110 for length in lengths[0])


@pytest.mark.parametrize("num_terms", [1, 2, 4])
def test_merges_are_all_different(num_terms: int) -> None:
    merges = [distinct(names(32), num_terms)(i) for i in range(32)]
    assert all(len(set(merge)) == num_terms for merge in merges)
    assert len({frozenset(merge) for merge in merges}) == 32


def test_slow_peers_are_measured_with_32_users_only() -> None:
    chosen = trials([*own_cases(100), *peer_cases()], CONCURRENCY)
    users = {slug: [trial.concurrency for trial in chosen if trial.case.slug == slug] for slug in ("off", "vllm-off", "vllm-32")}
    assert users == {"off": CONCURRENCY, "vllm-off": CONCURRENCY, "vllm-32": [32]}
    assert all(trial.num_requests >= trial.concurrency for trial in chosen)
    assert len({case.slug for case in [*own_cases(1), *peer_cases()]}) == len([*own_cases(1), *peer_cases()])


def test_a_gap_counts_if_it_overlaps_the_probe() -> None:
    times = [0.0, 1.0, 4.0, 5.0, 9.0]
    assert largest_gap(times, 4.2, 4.4) == 1
    assert largest_gap(times, 3.9, 4.4) == 3
    assert largest_gap(times, 0.5, 9.5) == 4
    assert largest_gap(times, 9.5, 9.9) == 0


def test_adapters_on_one_file_are_different_adapters(writer: Path, tmp_path: Path) -> None:
    base = identify_files(str(writer))
    store = write_adapters(tmp_path / "store", base, 6, num_files=4)
    loaded = [load_adapter(entry.folder, base) for entry in AdapterStore(store).list()]
    assert [adapter.name for adapter in loaded] == names(6)
    assert len({adapter.version for adapter in loaded}) == 6
    assert all(adapter.density == pytest.approx(DENSITY, abs=0.01) for adapter in loaded)
    assert len({round(b.density, 2) for b in loaded[0].modules.values()}) > 3
    weights = [(store / adapter_name(i) / "adapter_model.safetensors").stat().st_ino for i in range(6)]
    assert len(set(weights)) == 4


def test_users_send_the_next_request_only_after_an_answer() -> None:
    running, most = 0, 0

    async def send(one: Ask) -> Reply:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return Reply(num_completion=one.num_tokens)

    asks = make_asks("seed", 10, 10, 3, no_adapter)
    load = asyncio.run(closed_loop(send, asks, 3))
    assert (len(load.replies), most) == (10, 3)
    most = 0
    load = asyncio.run(open_loop(send, asks, [0.0] * 10))
    assert (len(load.replies), most) == (10, 10)


def test_an_answer_of_another_length_is_an_error() -> None:
    async def send(_: Ask) -> Reply:
        return Reply(num_completion=2)

    with pytest.raises(FailedError, match="2 tokens were generated, expected 3"):
        asyncio.run(closed_loop(send, [Ask(prompt("seed", 3), (), 3)], 1))


@pytest.mark.parametrize(
    ("head", "body", "message"),
    [
        ("400 Bad Request", b'{"error": "no such field"}', "400 Bad Request: .*no such field"),
        ("200 OK", b'f\r\ndata: {"error": \r\n6\r\n"so"}\n\r\n0\r\n\r\n', "so"),
    ],
)
def test_an_error_of_the_server_is_an_error(head: str, body: bytes, message: str) -> None:
    with pytest.raises(FailedError, match=message):
        asyncio.run(answered(f"HTTP/1.1 {head}\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + body))


def test_events_are_read_whatever_the_chunks() -> None:
    text = b'event: token\ndata: {"text": "a"}\n\ndata: {"choices": [{"text": "b"}]}\n\n'
    text += b'data: {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 2}}\n\ndata: [DONE]\n\n'
    for size in (1, 7, 1000):
        chunks = [text[i : i + size] for i in range(0, len(text), size)]
        body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
        reply = asyncio.run(answered(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body))
        assert (len(reply.times), reply.num_prompt, reply.num_completion) == (2, 4, 2)
        assert reply.asked < reply.times[0] <= reply.times[1] <= reply.ended


async def answered(answer: bytes) -> Reply:
    """Return the client's reply to a server that sends `answer`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        return await ask(server.sockets[0].getsockname()[1], "/generate", {}, Reply())


@pytest.mark.slow
@pytest.mark.parametrize(("num_adapters", "dtype"), [(0, "bfloat16"), (0, "float32"), (2, "bfloat16")])
def test_generate_and_peft_answer_a_batch(writer: Path, tmp_path: Path, num_adapters: int, dtype: str) -> None:
    base = identify_files(str(writer))
    store = write_adapters(tmp_path / "store", base, 2)
    export_adapters(tmp_path / "peft", store, 2)
    folders = [tmp_path / "peft" / name for name in names(num_adapters)]
    batches = start_batches(writer, folders, [0], tmp_path / "log", dtype)
    try:
        choose = distinct(names(2)) if num_adapters else no_adapter
        load = batches.measure(make_asks("seed", 5, 10, 4, choose), 2)
    finally:
        batches.program.end()
    assert [reply.num_completion for reply in load.replies] == [4] * 5
    assert all(reply.num_prompt > 10 for reply in load.replies)
    assert load.seconds > 0
    assert gaps_ms([load]) == []


@pytest.mark.slow
def test_a_program_that_does_not_start_says_why(writer: Path, tmp_path: Path) -> None:
    setting = Setting([0], tmp_path, writer, flags=["--no-such-flag"])
    with pytest.raises(FailedError, match="no-such-flag"), staged(setting) as stage, stage.own():
        pytest.fail("it started")


def test_a_missing_peer_is_left_out_with_the_reason(tmp_path: Path) -> None:
    assert "--peers" in missing_peers(None)["vLLM"]
    assert "peers.sh" in missing_peers(tmp_path)["llama.cpp"]
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "preload").touch()
    assert "vLLM" not in missing_peers(tmp_path)


@pytest.mark.needs("kernels")
def test_a_forced_instruction_set_has_its_own_build_of_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / "model.gguf").touch()
    for build, isa in (("build", ""), ("build-portable", "portable")):
        monkeypatch.setenv(MAX_ISA_VARIABLE, isa)
        assert f"llama.cpp/{build}/bin/llama-server" in missing_peers(tmp_path)["llama.cpp"]
        (tmp_path / "llama.cpp" / build / "bin").mkdir(parents=True)
        (tmp_path / "llama.cpp" / build / "bin" / "llama-server").touch()
        assert "llama.cpp" not in missing_peers(tmp_path)


@pytest.mark.slow
def test_the_plot_is_drawn(results: Results, tmp_path: Path) -> None:
    plot([asdict(row) for row in results.rows()], tmp_path / "serve.png")
    assert (tmp_path / "serve.png").stat().st_size > 10_000


@pytest.mark.slow
def test_other_requests_that_end_before_the_probe_fail_it(stage: Stage) -> None:
    short = replace(TINY, others_tokens=2)
    with stage.own() as server, pytest.raises(FailedError, match="too few"):
        probe_long(server, 2, [], short, "seed")


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_a_random_model_of_a_larger_shape_answers_with_its_tokenizers_tokens(name: str, tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    write_model(name, tmp_path, sizes)
    base = load_base_model(str(tmp_path), torch.bfloat16, "eager", torch.device("cpu"))
    assert base.model.config.vocab_size == SHAPES[name][1]["vocab_size"]
    with torch.inference_mode():
        logits = base.model(torch.tensor([[1, 2, 3]])).logits
    assert logits[..., len(base.tokenizer) :].eq(0).all()
    assert logits.argmax(-1).lt(len(base.tokenizer)).all()
