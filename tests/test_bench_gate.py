"""The tests that a benchmark demands: they exist, run once, and end the benchmark if they fail."""

from pathlib import Path

import pytest

from tests.bench import kernel, serve
from tests.bench.gate import check_tests


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORI_CACHE", str(tmp_path / "cache"))


def counting(folder: Path, passes: bool) -> tuple[Path, Path]:
    """Return a test file, and a second file to which each run of the test adds a line."""
    runs, test = folder / "runs", folder / "test_counting.py"
    test.write_text(f"def test():\n    open({str(runs)!r}, 'a').write('run\\n')\n    assert {passes}\n")
    return test, runs


@pytest.mark.parametrize("files", [serve.GATE, *kernel.GATE.values()], ids=["serve", *kernel.GATE])
def test_the_files_are_there(files: list[str]) -> None:
    paths = [Path(file) for file in files if file.endswith(".py")]
    assert paths
    assert all(path.is_file() for path in paths)


@pytest.mark.slow
def test_tests_that_passed_are_not_run_again(tmp_path: Path) -> None:
    test, runs = counting(tmp_path, passes=True)
    check_tests([str(test)])
    check_tests([str(test)])
    assert runs.read_text() == "run\n"
    check_tests([str(test), "-k", "test"])
    assert runs.read_text() == "run\nrun\n", "other arguments did not run the tests again"


@pytest.mark.slow
def test_a_failed_test_ends_the_benchmark_every_time(tmp_path: Path) -> None:
    test, runs = counting(tmp_path, passes=False)
    for _ in range(2):
        with pytest.raises(SystemExit, match="1 failed"):
            check_tests([str(test)])
    assert runs.read_text() == "run\nrun\n"
