"""Programs, rights and hardware that some tests need beside Python's packages.

A test asks by a mark, `pytest.mark.needs("chromium")`, a fixture by `need`. It is skipped where one is missing; a run whose
environment names it in TESTS_NEED ends before its first test instead. A GPU and the CPU's instruction sets cannot be required.
"""

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import pytest
import torch

from lori.kernels import native
from tests.server.cluster.namespaces import why_not

VARIABLE = "TESTS_NEED"
"""The environment variable with the names, of `REQUIRABLE`, that a run requires: `.ci/run` sets all."""


def chromium() -> str | None:
    """Return the path of the Chromium that the tests drive."""
    return next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


def _programs(*names: str, package: str) -> str | None:
    absent = [name for name in names if shutil.which(name) is None]
    return f"there is no {' and no '.join(absent)} on the PATH: apt install {package}" if absent else None


@cache
def _user_namespaces() -> str | None:
    if fault := _programs("unshare", package="util-linux"):
        return fault
    done = subprocess.run(["unshare", "-rn", "true"], check=False, capture_output=True, text=True)
    return f"this system permits no namespaces: {done.stderr.strip()}" if done.returncode else None


def _unless(is_there: object, reason: str) -> str | None:
    return None if is_there else reason


REQUIRABLE: dict[str, Callable[[], str | None]] = {
    "chromium": lambda: _unless(chromium(), "there is no chromium on the PATH: apt install chromium"),
    "prometheus": lambda: _programs("prometheus", "promtool", package="prometheus"),
    "network-namespaces": cache(why_not),
    "user-namespaces": _user_namespaces,
    "compiler": lambda: _programs("g++", package="g++"),
    "kernels": lambda: native.MISSING or None,
    "vllm-router": lambda: _unless(find_spec("vllm_router"), "there is no vllm-router: pip install vllm-router"),
}
"""For each name what returns why it is missing, or None where it is there."""
NEEDS = REQUIRABLE | {
    "gpu": lambda: _unless(torch.cuda.is_available(), "there is no GPU"),
}


def need(name: str) -> None:
    """Skip the running test where `name`, of `NEEDS`, is missing; fail it where the run requires it."""
    if reason := NEEDS[name]():
        if name in _required():
            pytest.fail(f"{VARIABLE} names {name}: {reason}")
        pytest.skip(reason)


def _required() -> list[str]:
    return os.environ.get(VARIABLE, "").split()


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a run that lacks what it requires, with all that is missing."""
    config.addinivalue_line("markers", "needs(name): what the test needs beside Python's packages, of tests/needs.py")
    if unknown := [name for name in _required() if name not in REQUIRABLE]:
        raise pytest.UsageError(f"{VARIABLE} names {', '.join(unknown)}, expected some of {', '.join(REQUIRABLE)}")
    if not hasattr(config, "workerinput"):  # a worker of xdist runs only where the first process found everything
        faults = [f"  {name}: {reason}" for name in _required() if (reason := REQUIRABLE[name]())]
        if faults:
            raise pytest.UsageError("\n".join([f"this run requires what is missing here ({VARIABLE}):", *faults]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a marked test before its fixtures are made."""
    for mark in item.iter_markers("needs"):
        need(*mark.args)
    if item.get_closest_marker("gpu"):
        need("gpu")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count the skipped tests by reason."""
    reasons = Counter(_reason(report) for report in terminalreporter.stats.get("skipped", ()))
    if reasons:
        terminalreporter.write_sep("=", "skipped tests by reason")
        for reason, count in reasons.most_common():
            terminalreporter.write_line(f"{count:6} {reason}")


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")
