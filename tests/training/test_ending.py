"""How programs end: an exit code, and a line that says why."""

import pytest

from lori.errors import LoriError
from training.command_line import ended


@pytest.mark.parametrize(("rank", "said"), [("0", "error: no such file\n"), ("3", "error of process 3: no such file\n")])
def test_each_process_says_its_error(
    rank: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that a process other than the first had alone once ended the run without a word."""

    def program() -> str:
        raise LoriError("no such file")

    monkeypatch.setenv("RANK", rank)
    assert ended(program) == 1
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize(("rank", "said"), [("0", "done\n"), ("3", "")])
def test_the_first_process_alone_says_what_was_done(
    rank: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    assert ended(lambda: "done") == 0
    assert capsys.readouterr() == (said, "")
