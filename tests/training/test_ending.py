"""End of a program: its exit code, and a line with the reason."""

import pytest

from lori.errors import LoriError
from training.command_line import run_program


@pytest.mark.parametrize(("rank", "output"), [("0", "error: no such file\n"), ("3", "error of process 3: no such file\n")])
def test_each_process_prints_its_error(
    rank: str, output: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Regression: an error of another process than the first ended the run without a message."""

    def program() -> str:
        raise LoriError("no such file")

    monkeypatch.setenv("RANK", rank)
    assert run_program(program) == 1
    assert capsys.readouterr() == ("", output)


@pytest.mark.parametrize(("rank", "output"), [("0", "done\n"), ("3", "")])
def test_only_the_first_process_prints_the_result(
    rank: str, output: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    assert run_program(lambda: "done") == 0
    assert capsys.readouterr() == (output, "")
