"""`python -m server.plan`, run as a program."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from server.plan.__main__ import main
from tests.server.live import REPOSITORY, Live

PLAN = ["--adapters", "300", "--rps", "20", "--tokens-per-s", "500"]
SIMULATION = ["--single-tokens-per-s", "100", "--simulate", "--disk-mb-per-s", "200", "--requests", "500"]


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LORI_")}
    command = [sys.executable, "-m", "server.plan", *flags]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_plan_and_a_simulation_are_printed(tmp_path: Path, tiny_model: Path) -> None:
    picture = tmp_path / "simulated.png"
    done = run("--model", str(tiny_model), *PLAN, *SIMULATION, "--replicas", "4", "--replicas", "6", "--plot", str(picture))
    assert (done.returncode, done.stderr) == (0, "")
    assert "python -m server --model" in done.stdout
    assert "This assumes:" in done.stdout
    assert "500 requests at 20 a second for 300 adapters, zipf 1" in done.stdout
    assert sum(policy in done.stdout for policy in ("affinity", "least loaded", "random")) == 3
    with Image.open(picture) as image:
        assert image.width > 500


def test_json_has_the_whole_plan(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["plan", "--model", str(tiny_model), *PLAN, *SIMULATION, "--json"])
    assert main() == 0
    document = json.loads(capsys.readouterr().out)
    assert document["num_replicas"] == document["num_needed"] + 1
    assert document["memory"]["total"] == sum(value for key, value in document["memory"].items() if key != "total")
    outcomes = document["simulation"]["outcomes"]
    assert [outcome["policy"] for outcome in outcomes] == ["affinity", "least loaded", "random"]
    assert {outcome["num_replicas"] for outcome in outcomes} == {document["num_needed"]}
    assert document["settings"]["rps"] == 20
    assert document["assumptions"]


def test_a_running_server_is_measured(
    live: Live, writer_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--users", "2", "--prompt-tokens", "8", "--completion-tokens", "4", "--server", live.url, "--json"]
    monkeypatch.setattr("sys.argv", ["plan", "--model", str(writer_model), "--adapters", "9", "--rps", "1", *flags])
    assert main() == 0
    document = json.loads(capsys.readouterr().out)
    assert document["speed"]["together"] > 0
    assert f"measured now at {live.url}" in "".join(document["assumptions"])


def test_the_embedded_model_needs_no_measuring(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--adapters", "10000", "--rank", "32", "--rps", "10", "--json"]
    monkeypatch.setattr("sys.argv", ["plan", *flags])
    assert main() == 0
    document = json.loads(capsys.readouterr().out)
    assert document["speed"] == {"single": 121, "together": 587, "users": 32}
    assert "docs/benchmarks.md: SmolLM2-135M in bfloat16 on one core" in "".join(document["assumptions"])
    monkeypatch.setattr("sys.argv", ["plan", *flags, "--simulate", "--disk-mb-per-s", "200", "--requests", "200"])
    assert main() == 0
    assert json.loads(capsys.readouterr().out)["simulation"]


@pytest.mark.parametrize(
    ("flags", "code", "expected"),
    [
        (["--adapters", "0", "--rps", "none"], 2, "--adapters: "),
        (["--adapters", "5", "--rps", "1", "--prompt-tokens", "9"], 2, "--tokens-per-s is missing"),
        ([*PLAN, "--model", "/no/model"], 1, "/no/model"),
        ([*PLAN, "--memory-gib", "0.5"], 1, "--memory-gib 0.5 holds 0 adapters"),
        ([*PLAN, *SIMULATION, "--replicas", "1000000000"], 1, "1000000000 are too many to simulate"),
        ([*PLAN, *SIMULATION, "--replicas", "1"], 1, "--replicas 1 cannot answer 20 requests/s"),
        (["--adapters", "5", "--rps", "1", "--server", "http://127.0.0.1:9"], 1, "127.0.0.1:9"),
    ],
)
def test_an_error_is_one_line(
    flags: list[str], code: int, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["plan", *flags])
    with pytest.raises(SystemExit) as end:
        sys.exit(main())
    error = capsys.readouterr().err
    assert end.value.code == code
    assert error.startswith("error: ")
    assert expected in error
    assert error.count("\n") == 1
