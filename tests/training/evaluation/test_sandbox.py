"""The sandbox: a program passes only if it completes, and leaves nothing behind."""

import json
import os
import socket
from pathlib import Path

import psutil
import pytest

from training.evaluation import sandbox
from training.evaluation.sandbox import Limits, SandboxError, run_programs, run_sandboxed

HUMANEVAL = Path(__file__).parents[4] / "shared" / "data" / "code" / "humaneval.jsonl"
LIMITS = Limits(seconds=60, cpu_s=1, memory_bytes=2**28)
needs_namespaces = pytest.mark.needs("user-namespaces")
CHECK = "\ndef check(f):\n    assert f(2) == 3\ncheck(f)"


def test_a_right_program_passes_and_a_wrong_one_does_not() -> None:
    right, wrong = "def f(x):\n    return x + 1" + CHECK, "def f(x):\n    return x" + CHECK
    assert run_programs([right, wrong, right, "def f(x:" + CHECK], LIMITS) == [True, False, True, False]


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "import os; os.execv('/bin/true', ['true'])",
        "quit()",
        "while True: pass",
        "x = [0] * 2**28",
        "x = b'x'\nwhile True: x += x",
        "import ctypes; ctypes.string_at(0)",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM); signal.pause()",
        "import os\nwhile True: os.fork()",
        "import threading; threading.Thread(target=print).start()",
        "import subprocess; subprocess.run(['true'])",
        "input()",
        "def f(): f()\nf()",
        "open('x', 'wb').write(b'x' * 2**24)",
        "import os; os.write(1, b'x' * 2**24); os.write(3, b'x' * 2**24); os._exit(0)",
    ],
)
def test_a_program_that_does_not_complete_fails(program: str) -> None:
    limits = Limits(seconds=2, cpu_s=1, memory_bytes=2**28)
    assert not run_sandboxed(program + "\n" if "\n" in program else program + ";", limits)


def test_output_is_discarded(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_sandboxed("import sys\nprint('out' * 10**6); print('err', file=sys.stderr)", LIMITS)
    assert capfd.readouterr() == ("", "")


def test_a_program_sees_nothing_of_its_callers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    assert run_sandboxed("import os\nassert 'SECRET' not in os.environ and not os.listdir()", LIMITS)
    assert run_sandboxed("import importlib.util\nassert not importlib.util.find_spec('torch')", LIMITS)


@needs_namespaces
def test_a_program_changes_no_file_and_has_no_network(tmp_path: Path) -> None:
    file = tmp_path / "kept"
    file.write_text("as it was")
    for program in (f"open('{file}', 'w')", f"import os; os.remove('{file}')", f"open('{tmp_path}/new', 'w')"):
        assert not run_sandboxed(program, LIMITS)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["as it was"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert not run_sandboxed(f"import socket\nsocket.create_connection({server.getsockname()})", LIMITS)
    assert not run_sandboxed("import os\nos.kill(-1, 9)", LIMITS)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["import os\nos.setsid()\nimport time\ntime.sleep(600)", "import os\nos.fork()", "x = 1"])
def test_nothing_survives(program: str) -> None:
    # A limit of its own tells this test's programs from those of tests beside it.
    limits = Limits(seconds=1 + os.getpid() / 1e8)
    own_arguments = {str(sandbox.ISOLATED), str(limits.seconds)}

    def running() -> set[int]:
        processes = psutil.process_iter(["cmdline"])
        return {process.pid for process in processes if own_arguments <= {*(process.info["cmdline"] or [])}}

    run_sandboxed(program, limits)
    assert not running()


def test_a_system_without_limits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "ISOLATED", Path("/nowhere.py"))
    with pytest.raises(SandboxError, match="takes Linux"):
        run_programs(["pass"], LIMITS)


@pytest.mark.slow
@pytest.mark.skipif(not HUMANEVAL.is_file(), reason="HumanEval is not beside this checkout")
def test_the_solutions_that_come_with_humaneval_pass() -> None:
    rows = [json.loads(line) for line in HUMANEVAL.read_text(encoding="utf-8").splitlines()]
    programs = [f"{row['prompt']}{row['completion']}\n{row['test']}\ncheck({row['entry_point']})" for row in rows]
    failed = [row["task_id"] for row, passed in zip(rows, run_programs(programs, Limits()), strict=True) if not passed]
    assert not failed
    empty = [f"{row['prompt']}    pass\n{row['test']}\ncheck({row['entry_point']})" for row in rows[:20]]
    assert not any(run_programs(empty, Limits()))
