"""`python -m server` as a process: its exit codes, and its errors if it cannot start."""

import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from pydantic import ValidationError

from lori.config import seal_config
from lori.errors import LoriError
from lori.flags import package_version
from lori.format import read_config
from lori.native import MODULE, choose
from lori.projection import Quantization
from server import loading
from server.loading import fingerprint, load_service, weighing_name
from server.settings import Settings
from tests.lori.features import draw, make_background
from tests.server.forked import run_forked, start_forked
from tests.server.live import LIMIT_S, RunProgram, events, run_main, start
from tests.server.rig import rig_of


@dataclass(frozen=True, slots=True)
class Ended:
    """The exit code of a server that cannot start, and the lines that it printed, without the INFO lines."""

    code: int
    lines: list[str]


@pytest.fixture(scope="module")
def cannot_start(writer_model: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Return the ends of servers with wrong flags, by the fault. One per exit code is started by `run_main`, as a user does."""
    place = tmp_path_factory.mktemp("main")
    flags = {
        "bad flags": ["--port", "99999", "--max-batch", "none", "--device", "tpu"],
        "no model": ["--model", "no/such-model"],
        "no device": ["--device", "cuda:99"],
        "unsound adapters": ["--model", str(writer_model), "--adapters", str(unsound(adapters, place / "adapters")), "--strict"],
    }
    programs: dict[str, RunProgram] = {"bad flags": run_main, "no model": run_main}
    processes = {name: programs.get(name, run_forked)(place / name, *args) for name, args in flags.items()}
    try:
        return {name: Ended(p.wait(LIMIT_S), without_progress((place / name).read_text())) for name, p in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def without_progress(log: str) -> list[str]:
    """Return the lines of a log without its INFO lines."""
    return [line for line in log.splitlines() if not line.startswith("INFO ")]


def unsound(adapters: Path, place: Path) -> Path:
    """Copy `adapters` and spoil them: math is for another base, two configs are invalid, and intent's weights are damaged."""
    shutil.copytree(adapters, place)
    config = read_config(place / "math")
    section = config.lori.model_copy(update={"base_digest": "1" * 64})
    _, content = seal_config("math", config.model_copy(update={"lori": section}))
    (place / "math" / "adapter_config.json").write_bytes(content)
    shutil.copytree(adapters / "math", place / "changed")
    changed = json.loads((place / "changed" / "adapter_config.json").read_text()) | {"lora_alpha": 1.0}
    (place / "changed" / "adapter_config.json").write_text(json.dumps(changed))
    (place / "safety" / "adapter_config.json").write_text('{"r": 0}')
    (place / "intent" / "adapter_model.safetensors").write_bytes(b"nothing of the kind")
    return place


def test_bad_flags_are_named_all_at_once(cannot_start: dict[str, Ended]) -> None:
    ended = cannot_start["bad flags"]
    assert ended.code == 2
    assert len(ended.lines) == 1
    assert "--port: " in ended.lines[0]
    assert "--max-batch: " in ended.lines[0]
    assert "--device: " in ended.lines[0]


def test_a_device_that_is_not_there_is_one_clear_line(cannot_start: dict[str, Ended]) -> None:
    ended = cannot_start["no device"]
    assert ended.code == 1
    assert len(ended.lines) == 1
    assert ended.lines[0].startswith("error: --device cuda:99: ")
    assert ended.lines[0].endswith("; pass --device cpu, or one that is there")


def test_unsound_adapters_are_reported_whole(cannot_start: dict[str, Ended]) -> None:
    ended = cannot_start["unsound adapters"]
    assert ended.code == 1
    assert any(line.startswith("error: ") for line in ended.lines)
    text = "\n".join(ended.lines)
    config = "adapter_config.json"
    for part in ("math: trained on the base", f"changed: {config}: its digest is", f"safety: {config}: r: ", "lora_alpha: Field"):
        assert part in text
    assert "intent: adapter_model.safetensors has 19 bytes, which end within its header" in text
    assert "Traceback (most recent call last):" not in ended.lines


@pytest.mark.slow
def test_bad_weights_fail_only_the_requests_that_name_them(writer_model: Path, adapters: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(adapters, tmp_path / "adapters"))
    flags = ["--model", str(writer_model), "--adapters", str(place), "--dtype", "float32", "--threads", "1"]
    with start_forked(tmp_path / "log", *flags, "--kv-cache-gib", "0.01") as live:
        (place / "safety" / "adapter_model.safetensors").write_bytes(b"nothing of the kind")
        for adapter in ("safety", ["math", "safety"], "safety"):
            reply = live.client.post("/generate", json={"prompt": "a", "max_tokens": 3, "adapter": adapter})
            assert reply.is_error
            message = reply.json()["error"]["message"]
            assert message.startswith("adapter 'safety' cannot be served: ")
            assert "adapter_model.safetensors is not" in message
            assert str(place) not in message, "a client gets the faults, but not the file's path"
        assert live.metric("lori:adapter_load_failures_total") >= 2
        for fine in (None, "math"):
            assert len(live.generate(prompt="a", max_tokens=3, adapter=fine)["text"]) == 3
        assert live.client.get("/ready").status_code == 200
        assert "Traceback" not in live.log.read_text()


@pytest.mark.slow
def test_adapters_too_large_for_the_memory_are_refused_by_field(writer_model: Path, adapters: Path, tmp_path: Path) -> None:
    flags = ["--model", str(writer_model), "--adapters", str(adapters), "--dtype", "float32", "--threads", "1"]
    with start_forked(tmp_path / "log", *flags, "--kv-cache-gib", "0.01", "--resident-gib", "1e-6") as live:
        reply = live.client.post("/generate", json={"prompt": "a", "max_tokens": 3, "adapter": ["math", "safety"]})
        assert reply.status_code == 400
        error = reply.json()["error"]
        assert (error["param"], error["type"]) == ("adapter", "BadRequestError")
        assert "names 'math', 'safety', which keep " in error["message"]
        assert "expected at most 214, for which there is memory (--resident-gib)" in error["message"]
        assert len(live.generate(prompt="a", max_tokens=3)["text"]) == 3


def test_an_unknown_model_is_one_clear_line(cannot_start: dict[str, Ended]) -> None:
    ended = cannot_start["no model"]
    assert ended.code == 1
    assert ended.lines[0].startswith("error: cannot load the base model 'no/such-model': ")
    assert len(ended.lines) == 1


@pytest.mark.slow
def test_sigterm_lets_a_running_request_finish_and_ends_well(writer_model: Path, tmp_path: Path) -> None:
    flags = ["--model", str(writer_model), "--dtype", "float32", "--threads", "1", "--kv-cache-gib", "0.01"]
    with start(tmp_path / "log", *flags) as live:
        body = {"prompt": "a", "max_tokens": 600, "stream": True}
        with live.client.stream("POST", "/generate", json=body) as reply:
            heard = events(reply.iter_lines())
            next(heard)
            live.process.send_signal(signal.SIGTERM)
            *tokens, (last, done) = heard
        assert last == "done"
        assert done["finish_reason"] == "length"
        assert done["usage"]["completion_tokens"] == 600
        assert len(tokens) == 599
        assert live.process.wait(LIMIT_S) == 0
        assert "Traceback" not in live.log.read_text()
        with pytest.raises(httpx.ConnectError):
            live.client.get("/health")


def test_an_unknown_flag_is_named_in_a_line() -> None:
    done = subprocess.run([sys.executable, "-m", "server", "--prot", "1"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: there is no flag --prot: did you mean --port?\n")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        pytest.param({"max_batch": 64, "max_step_tokens": 2}, "max.step.tokens", id="a step without room for prompts"),
        pytest.param({"kv_cache_gib": 1e-9}, "kv.cache.gib", id="hardly any memory"),
        pytest.param({"kv_cache_gib": float("inf")}, "kv.cache.gib", id="endless memory"),
        pytest.param({"kv_cache_gib": 1e9}, "kv.cache.gib", id="more memory than there is"),
    ],
)
def test_impossible_settings_are_refused_by_name(writer_model: Path, flags: dict[str, Any], named: str) -> None:
    """Check that the error is one of the two types that `main` reports in a line."""
    with pytest.raises((ValidationError, LoriError), match=named):
        load_service(Settings(model=str(writer_model), dtype="float32", **flags))


def test_the_limits_of_steps_are_those_of_the_settings(writer_model: Path) -> None:
    settings = Settings(
        model=str(writer_model),
        dtype="float32",
        max_batch=3,
        max_step_tokens=40,
        max_stall=1.3,
        short_step_ms=20,
        kv_cache_gib=0.01,
    )
    limits = rig_of(load_service(settings)).scheduler.limits
    assert (limits.max_sequences, limits.max_tokens, limits.max_stall, limits.short_step_s) == (3, 40, 1.3, 0.02)


@pytest.mark.needs("kernels")
def test_too_little_container_memory_for_keys_and_values_is_reported(
    writer_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the machine had the memory, but the container did not, and the system killed the server as it took it."""
    for name, text in {"memory.max": 3 << 29, "memory.current": 1 << 30, "memory.stat": "inactive_file 0\nactive_file 0"}.items():
        (tmp_path / name).write_text(str(text))
    (tmp_path / "own").write_text("0::/\n")
    monkeypatch.setattr("lori.resources.CGROUPS", tmp_path)
    monkeypatch.setattr("lori.resources.MEMBERSHIP", tmp_path / "own")
    with pytest.raises(LoriError, match=r"--kv-cache-gib: there is no room for .*: 1\.0 GiB of 0\.5 that are free"):
        load_service(Settings(model=str(writer_model), dtype="float32", kv_cache_gib=1))


@pytest.mark.parametrize("error", [MemoryError("none left"), torch.OutOfMemoryError("none left")])
def test_too_little_memory_for_the_timed_steps_is_reported(
    writer_model: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("server.served_model.measure_step_cost", fail)
    with pytest.raises(LoriError, match=r"--max-step-tokens.*there is no room for a step: none left"):
        load_service(Settings(model=str(writer_model), dtype="float32", kv_cache_gib=0.01))


@pytest.mark.parametrize(("device", "num_threads", "waits"), [("cpu", 1000, True), ("cpu", 1, False), ("cuda", 1000, False)])
def test_a_step_waits_for_an_adapter_if_it_would_take_the_reader_s_core(
    device: str, num_threads: int, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert (loading._patience_s(torch.device(device)) > 0) is waits


@pytest.mark.parametrize("module", ["server", "server.cluster", pytest.param("training.fit", marks=pytest.mark.slow)])
def test_the_usage_names_the_program_as_it_is_started(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: python -m {module} ")


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_fingerprint_names_kernels_and_types(quantization: Quantization | None, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, name = torch.device("cpu"), f"lori-{package_version()}-{choose() if MODULE else 'portable'}"
    by_torch = f"-torch-{torch.__version__}-{torch.backends.cpu.get_cpu_capability().lower()}"
    suffix = f"-{quantization}" if quantization else ""
    assert fingerprint(torch.bfloat16, cpu, quantization) == f"{name}-bfloat16{suffix}" + ("" if MODULE else by_torch)
    assert fingerprint(torch.float32, cpu, quantization) == f"{name}-float32{suffix}{by_torch}"
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    on_gpu = fingerprint(torch.bfloat16, torch.device("cuda"), quantization)
    assert on_gpu.startswith(f"lori-{package_version()}-sm90-bfloat16{suffix}-torch-")


def test_a_fingerprint_names_what_decides_automatic_weights() -> None:
    """Regression: servers with other backgrounds, or another `--default-merge`, had the same fingerprint."""
    background, settings = make_background(), Settings()
    name = weighing_name(settings, background)
    assert re.fullmatch("auto-[0-9a-f]{8}", name)
    assert name == weighing_name(Settings(), make_background())
    changes: list[dict[str, Any]] = [{"default_merge": "linear"}, {"auto_max_adapters": 4}, {"auto_threshold": 0.4}]
    others = {weighing_name(Settings(**change), background) for change in changes}
    others.add(weighing_name(settings, replace(background, base_digest="c" * 64)))
    others.add(weighing_name(settings, background.extended([draw(3)])))
    assert len(others - {name}) == len(changes) + 2
    assert weighing_name(settings, None) == ""
    arguments = (torch.float32, torch.device("cpu"), None)
    assert fingerprint(*arguments, name) == f"{fingerprint(*arguments)}-{name}"
