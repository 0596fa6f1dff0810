"""The tests that must pass before a benchmark prints a figure. They run once for the same code on the same machine."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lori.embedded import cache_dir
from lori.native import MAX_ISA_VARIABLE, MODULE, description
from tests.bench.machine import machine, versions

REPOSITORY = Path(__file__).parents[2]
CODE = ("lori", "server", "tests")
"""Folders whose files the tests depend on, beside pyproject.toml."""


def check_tests(arguments: Sequence[str]) -> None:
    """Run pytest with `arguments`, unless it has passed on this code before. Ends the program if a test fails."""
    stamp = cache_dir() / "bench" / f"{_digest(arguments)}.passed"
    if stamp.exists():
        return
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    print("running the tests of what is measured, once for this code …", file=sys.stderr)
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if process.returncode:
        sys.exit(f"{process.stdout}{process.stderr}\nerror: the tests of what is measured fail: {' '.join(command)}")
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.touch()


def _digest(arguments: Sequence[str]) -> str:
    host = [*map(str, machine().values()), *versions().values(), description(), os.environ.get(MAX_ISA_VARIABLE, "")]
    digest = hashlib.sha256(repr([list(arguments), host]).encode())
    files = [path for folder in CODE for path in (REPOSITORY / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"]
    built = [Path(MODULE.__file__)] if MODULE and MODULE.__file__ else []
    for path in [*sorted(files), REPOSITORY / "pyproject.toml", *built]:
        digest.update(repr((str(path), hashlib.sha256(path.read_bytes()).hexdigest())).encode())
    return digest.hexdigest()
