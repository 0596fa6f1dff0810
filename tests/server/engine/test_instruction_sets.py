"""A server that may not use all of the processor's instruction sets."""

from pathlib import Path

import pytest

from lori.native import MAX_ISA_VARIABLE, description, instruction_sets
from tests.server.forked import run_forked, start_forked
from tests.server.live import LIMIT_S, Live


@pytest.mark.slow
@pytest.mark.needs("kernels")
def test_a_server_on_portable_code_reports_it_and_answers_the_same(
    live: Live, writer_model: Path, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MAX_ISA_VARIABLE, "portable")
    flags = ["--model", str(writer_model), "--adapters", str(adapters), "--threads", "1", "--kv-cache-gib", "0.01"]
    with start_forked(tmp_path / "log", *flags) as server:
        log = server.log.read_text()
        assert " in float32 on cpu" in log  # because products in bfloat16 would be slower
        assert "C++ (portable" in description()
        assert f"deltas in {description()}" in log
        for adapter in (None, "math", ["math", "safety"]):
            body = {"prompt": "One two three", "adapter": adapter, "max_tokens": 12}
            assert server.generate(**body)["text"] == live.generate(**body)["text"]


@pytest.mark.slow
@pytest.mark.needs("kernels")
@pytest.mark.skipif("avx2" not in instruction_sets(), reason="this CPU has no AVX2, or may not use it")
def test_a_server_without_instructions_for_bfloat16_multiplies_in_it(
    writer_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MAX_ISA_VARIABLE, "avx2")
    flags = ["--model", str(writer_model), "--threads", "1", "--kv-cache-gib", "0.01"]
    with start_forked(tmp_path / "log", *flags) as server:
        log = server.log.read_text()
        assert " in bfloat16 on cpu" in log
        assert "products in C++, attention in C++, deltas in C++ (avx2" in log
        assert len(server.generate(prompt="One two three", max_tokens=12)["text"]) == 12


@pytest.mark.slow
def test_an_unknown_instruction_set_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MAX_ISA_VARIABLE, "avx1024")
    process = run_forked(tmp_path / "log", "--port", "0")
    assert process.wait(LIMIT_S) == 1
    message = f"{MAX_ISA_VARIABLE}=avx1024 is not an instruction set, expected one of portable, avx2, avx512, avx512_bf16, amx"
    start, *rest = (tmp_path / "log").read_text().splitlines()
    assert start.startswith("INFO server.program: lori-server ")
    assert rest == [f"error: {message}"]
