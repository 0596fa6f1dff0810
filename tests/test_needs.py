"""Needs of tests: a run that requires a missing program ends; other runs skip tests and count the skipped ones."""

import os
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest

from tests.needs import REQUIRABLE, VARIABLE, pytest_configure

ROOT = Path(__file__).parents[1]
TESTS = """
import pytest
from tests.needs import need


@pytest.fixture
def browser():
    need("chromium")


@pytest.mark.needs("chromium")
@pytest.mark.parametrize("number", [1, 2])
def test_by_a_mark(number):
    print("ran by a mark")


def test_by_a_fixture(browser):
    print("ran by a fixture")


def test_of_another_reason():
    pytest.skip("it is Sunday")


def test_that_needs_nothing():
    pass
"""


def run(folder: Path, required: str, *flags: str, programs: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run `TESTS` in `folder`. The PATH has only stand-ins for `programs`."""
    (folder / "bin").mkdir()
    for name in programs:
        (folder / "bin" / name).touch(0o755)
    (folder / "test_it.py").write_text(TESTS)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment |= {
        "PATH": str(folder / "bin"),
        "PYTHONPATH": str(ROOT),
        VARIABLE: required,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    plugins = ["-p", "tests.needs", "-p", "xdist", "-c", os.devnull, "--rootdir", str(folder)]
    command = [sys.executable, "-m", "pytest", *plugins, *flags, str(folder)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def table(output: str) -> list[str]:
    """Return the lines that count skipped tests."""
    lines = output.partition(" skipped tests by reason ")[2].splitlines()[1:]
    return [line.strip() for line in takewhile(lambda line: not line.startswith("="), lines)]


@pytest.mark.slow
def test_without_a_required_program_no_test_is_run(tmp_path: Path) -> None:
    done = run(tmp_path, "chromium prometheus", "-s", programs=("promtool",))
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "chromium: there is no chromium on the PATH: apt install chromium" in done.stderr
    assert "prometheus: there is no prometheus on the PATH: apt install prometheus" in done.stderr
    assert "collected" not in done.stdout


@pytest.mark.slow
def test_a_run_that_requires_nothing_skips_and_counts_by_reason(tmp_path: Path) -> None:
    done = run(tmp_path, "", "-n", "1")
    assert done.returncode == pytest.ExitCode.OK
    assert "1 passed, 4 skipped" in done.stdout
    assert table(done.stdout) == ["3 there is no chromium on the PATH: apt install chromium", "1 it is Sunday"]


@pytest.mark.slow
def test_with_the_required_program_its_tests_are_run(tmp_path: Path) -> None:
    done = run(tmp_path, "chromium", "-s", programs=("chromium-browser",))
    assert done.returncode == pytest.ExitCode.OK
    assert "4 passed, 1 skipped" in done.stdout
    assert table(done.stdout) == ["1 it is Sunday"]
    assert done.stdout.count("ran by a mark") == 2
    assert done.stdout.count("ran by a fixture") == 1


def test_an_unknown_need_is_refused_with_the_known_ones(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    monkeypatch.setenv(VARIABLE, "chrome")
    with pytest.raises(pytest.UsageError, match=f"TESTS_NEED names chrome, expected some of {', '.join(REQUIRABLE)}"):
        pytest_configure(pytestconfig)


def test_the_gate_requires_all_that_can_be_required() -> None:
    [line] = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith(f"export {VARIABLE}=")]
    assert line.partition("=")[2].strip('"').split() == [*REQUIRABLE]
