"""Servers whose engine has died or is stuck: the process of `python -m server` ends, so that it is started again."""

import signal
import subprocess
from pathlib import Path

import httpx
import pytest

from server.engine.thread import REARM_S
from tests.server.forked import start_forked
from tests.server.keyed import write_keys
from tests.server.live import LIMIT_S, Live, events
from tests.server.replies import refusal

DYING = "tests.server.dying_server"


@pytest.fixture
def flags(writer_model: Path) -> list[str]:
    return ["--model", str(writer_model), "--dtype", "float32", "--threads", "1", "--kv-cache-gib", "0.01"]


def kill_engine(live: Live, prompt: str = "die") -> None:
    """Make the engine die, and check the error that its client receives."""
    error = refusal(live.client.post("/generate", json={"prompt": prompt}), 500)
    assert error["message"] == "the engine died: MemoryError('out of luck')"


def assert_is_unhealthy(live: Live) -> None:
    try:
        reply = live.client.get("/health")
    except httpx.TransportError:  # on a slow machine the server has ended already
        return
    assert refusal(reply, 503)["message"] == "the engine is not running"


@pytest.mark.slow
def test_a_server_whose_engine_died_reports_it_and_ends(flags: list[str], tmp_path: Path) -> None:
    with start_forked(tmp_path / "log", *flags, module=DYING) as live:
        assert live.client.get("/health").status_code == 200
        body = {"prompt": "a", "max_tokens": 4000, "stream": True}
        with httpx.stream("POST", f"{live.url}/generate", json=body, timeout=LIMIT_S) as reply:
            stream = events(reply.iter_lines())
            next(stream)
            kill_engine(live)
            assert_is_unhealthy(live)
            *_, (last, data) = stream
        assert (last, data["error"]["code"]) == ("error", 500)
        assert live.process.wait(LIMIT_S) == 1
    log = (tmp_path / "log").read_text()
    assert "CRITICAL server.engine.thread: the engine died" in log
    assert 'raise MemoryError("out of luck")' in log, "the log has the stack of the error"


@pytest.mark.slow
def test_a_thread_that_never_ends_does_not_keep_a_dead_server_alive(flags: list[str], tmp_path: Path) -> None:
    with start_forked(tmp_path / "log", *flags, module=DYING) as live:
        kill_engine(live, "die and leave a thread")
        assert live.process.wait(LIMIT_S) == 1
    log = (tmp_path / "log").read_text()
    assert "Timeout (" in log, "the timer ends the process as a last resort"
    assert 'raise MemoryError("out of luck")' in log


@pytest.mark.slow
@pytest.mark.parametrize(("prompt", "log_format"), [("wait", "json"), ("hold the lock", "text")])
def test_a_step_that_never_ends_ends_the_server(flags: list[str], tmp_path: Path, prompt: str, log_format: str) -> None:
    flags += ["--max-step-s", "1", "--log-format", log_format]
    with start_forked(tmp_path / "log", *flags, module=DYING) as live:
        with pytest.raises(httpx.TransportError):
            live.client.post("/generate", json={"prompt": prompt})
        assert live.process.wait(LIMIT_S) == 1
    log = (tmp_path / "log").read_text()
    assert "Timeout (" in log
    assert f"in {prompt.replace(' ', '_')}" in log, "the log names the function in which the step is stuck"


@pytest.mark.slow
def test_an_idle_server_is_not_taken_for_stuck(flags: list[str], tmp_path: Path) -> None:
    """A server that computes many steps is not taken for stuck, either."""
    with start_forked(tmp_path / "log", *flags, "--max-step-s", "5") as live:
        assert len(live.generate(prompt="a", max_tokens=1000)["text"]) == 1000
        with pytest.raises(subprocess.TimeoutExpired):
            live.process.wait(5 + REARM_S + 1)
        assert len(live.generate(prompt="a", max_tokens=1000)["text"]) == 1000
        live.process.send_signal(signal.SIGTERM)
        assert live.process.wait(LIMIT_S) == 0
    assert "Timeout (" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_key_file_that_is_no_longer_watched_ends_the_server(flags: list[str], tmp_path: Path) -> None:
    """Otherwise revoked keys would stay valid for ever."""
    flags += ["--keys", str(write_keys(tmp_path)), "--drain-notice-s", "0"]
    with start_forked(tmp_path / "log", *flags, module=DYING) as live:
        (tmp_path / "keys.toml").write_text("# die")
        assert live.process.wait(LIMIT_S) == 1
    assert "out of luck" in (tmp_path / "log").read_text()
