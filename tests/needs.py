"""Programs, rights and hardware that some tests need besides Python packages.

A test declares a need by a mark, `pytest.mark.needs("chromium")`, a fixture by `need`. If a need is missing, the test is skipped.
If TESTS_NEED names the need, the run ends before its first test instead. A GPU and the CPU's instruction sets cannot be required.
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

from lori import native
from tests.server.cluster.namespaces import why_not

VARIABLE = "TESTS_NEED"
"""Environment variable with the names, out of `REQUIRABLE`, that a run requires. `.ci/run` sets all of them."""


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
"""By name: a function that returns why the need is missing, or None if it is met."""
NEEDS = REQUIRABLE | {
    "gpu": lambda: _unless(torch.cuda.is_available(), "there is no GPU"),
}


def need(name: str) -> None:
    """Skip the running test if `name`, a key of `NEEDS`, is missing. Fail the test if the run requires `name`."""
    if reason := NEEDS[name]():
        if name in _required():
            pytest.fail(f"{VARIABLE} names {name}: {reason}")
        pytest.skip(reason)


def _required() -> list[str]:
    return os.environ.get(VARIABLE, "").split()


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a run that lacks required programs, and list all that are missing."""
    config.addinivalue_line("markers", "needs(name): what the test needs beside Python's packages, of tests/needs.py")
    if unknown := [name for name in _required() if name not in REQUIRABLE]:
        raise pytest.UsageError(f"{VARIABLE} names {', '.join(unknown)}, expected some of {', '.join(REQUIRABLE)}")
    if not hasattr(config, "workerinput"):  # xdist starts workers only after the first process has found everything
        faults = [f"  {name}: {reason}" for name in _required() if (reason := REQUIRABLE[name]())]
        if faults:
            raise pytest.UsageError("\n".join([f"this run requires what is missing here ({VARIABLE}):", *faults]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a marked test before its fixtures are created."""
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
