"""A server on a machine where no compiler built the CPU kernel."""

from pathlib import Path

import pytest

from tests.server.live import Live, start


@pytest.mark.slow
def test_without_the_kernel_the_server_warns_and_answers_the_same(
    live: Live, writer_model: Path, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['_lori_cpu'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    flags = ["--model", str(writer_model), "--adapters", str(adapters), "--dtype", "float32", "--threads", "1"]
    with start(tmp_path / "log", *flags, "--kv-cache-gib", "0.01") as slow:
        log = slow.log.read_text()
        assert "WARNING server.loading: SLOW: the CPU kernel was not built at install" in log
        assert "(apt install g++ python3-dev), then install lori-server again" in log
        assert "deltas in torch alone" in log
        for adapter in (None, "math", ["math", "safety"]):
            body = {"prompt": "One two three", "adapter": adapter, "max_tokens": 12}
            assert slow.generate(**body)["text"] == live.generate(**body)["text"]
    assert "SLOW" not in live.log.read_text()
    assert "deltas in C++" in live.log.read_text()
