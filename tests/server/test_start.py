"""The output of a server's start, and the interruption of a start."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import pytest
from pydantic_settings import BaseSettings

from lori.flags import package_version
from server.arguments import GROUPS
from server.cluster.settings import ClusterSettings
from server.settings import Settings
from tests.server.forked import run_forked
from tests.server.live import LIMIT_S, REPOSITORY, Live, Process, RunProgram, run_main, start, wait_until
from training.config import FitConfig

STAGES = {
    "lori-server": "importing torch",
    "loading": "loading the model",
    "reading the adapters": "reading the adapters",
    "preparing": "checking the model",
    "timing": "timing steps",
}
"""The beginning of the log line of each stage of the start, and the stage's name."""


def ended_by_interrupt(process: Process, log: Path) -> None:
    """Send SIGINT as Ctrl+C does, and check that the process ends by it without further output."""
    before = log.read_text()
    process.send_signal(signal.SIGINT)
    assert process.wait(LIMIT_S) == -signal.SIGINT, log.read_text()
    assert log.read_text() == before
    assert "Traceback" not in before


@pytest.mark.slow
@pytest.mark.parametrize("line", [pytest.param(line, id=stage) for line, stage in STAGES.items()])
def test_ctrl_c_ends_a_start_at_once(line: str, writer_model: Path, adapters: Path, tmp_path: Path) -> None:
    """Interrupt code that runs in C. Python's own handler would wait for it, and then print a traceback."""
    flags = ["--model", str(writer_model), "--adapters", str(adapters), "--dtype", "float32", "--threads", "1", "--port", "0"]
    log = tmp_path / "log"
    run = run_main if line == "lori-server" else run_forked
    process = run(log, line, *flags, "--kv-cache-gib", "0.01", module="tests.server.held_start")
    try:
        wait_until(lambda: f": {line}" in log.read_text() or process.poll() is not None, f"the line {line!r}")
        ended_by_interrupt(process, log)
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_ctrl_c_during_the_download_leaves_nothing_behind(tmp_path: Path) -> None:
    """Send the signal to the server only, although a terminal would send it to pip as well."""
    cache, log = tmp_path / "cache", tmp_path / "log"
    with socket.create_server(("127.0.0.1", 0)) as index:  # accepts connections, and never answers
        address = f"http://127.0.0.1:{index.getsockname()[1]}/simple"
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("LORI_", "PIP_"))}
        environment |= {"LORI_CACHE": str(cache), "PIP_INDEX_URL": address, "PIP_CONFIG_FILE": os.devnull, "NO_PROXY": "*"}
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "server", "--port", "0"], cwd=REPOSITORY, env=environment, stdout=file, stderr=file
            )
        try:
            index.settimeout(LIMIT_S)
            connection, _ = index.accept()
            with connection:
                assert "INFO lori.embedded: Fetching" in log.read_text()
                children = psutil.Process(process.pid).children(recursive=True)
                assert any("pip" in child.cmdline() for child in children)
                process.send_signal(signal.SIGINT)
                assert process.wait(LIMIT_S) == -signal.SIGINT
        finally:
            process.kill()
            process.wait()
    assert "Traceback" not in log.read_text()
    assert list(cache.iterdir()) == []
    _, alive = psutil.wait_procs(children, timeout=LIMIT_S)
    assert not alive


@pytest.mark.slow
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_bar_comes_between_the_lines_of_a_log(log_format: str) -> None:
    """Regression: reading GGUF wrote a line of progress bars, which was no JSON, at the first start of a server."""
    code = (
        f"from server.telemetry.logs import configure_start; configure_start({log_format!r})\n"
        "from tqdm.auto import tqdm; from transformers.utils import logging; from huggingface_hub.utils import tqdm as hub\n"
        "for bar in (tqdm, logging.tqdm, hub): assert list(bar(range(3))) == [0, 1, 2]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("program", ["server.program", "server.cluster.program"])
def test_the_first_line_waits_for_no_torch(program: str) -> None:
    code = f"import sys, {program}; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'ray')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_the_last_line_names_the_address_the_model_and_the_memory(live: Live) -> None:
    wait_until(lambda: "ready on" in live.log.read_text(), "the last line of the start")
    lines = live.log.read_text().splitlines()
    [ready] = [line for line in lines if "ready on" in line]
    assert re.fullmatch(
        rf"INFO server\.http_server: ready on {live.url}: tiny-writer in float32 on cpu with (portable|avx\w+|amx|torch alone), "
        r"3 adapters; 1\.0 GiB for adapters holds (about \d+|the 1024 of --max-resident) of these",
        ready,
    )
    assert lines[0] == f"INFO server.program: lori-server {package_version()} starts: importing torch and transformers …"


@pytest.mark.slow
def test_nothing_is_printed_after_the_log(writer_model: Path, adapters: Path, tmp_path: Path) -> None:
    """Regression: nanobind listed the objects that Triton's library still holds at exit, in about a hundred lines."""
    flags = ["--model", str(writer_model), "--adapters", str(adapters), "--dtype", "float32", "--threads", "1"]
    with start(tmp_path / "log", *flags, "--kv-cache-gib", "0.01") as live:
        live.generate(prompt="a", adapter="math", max_tokens=2)
        live.client.close()
        live.process.send_signal(signal.SIGINT)
        assert live.process.wait(LIMIT_S) == 0
    assert "leaked" not in live.log.read_text()
    assert live.log.read_text().splitlines()[-1].startswith("INFO ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "run"),
    [
        ("server", run_main),
        ("server.cluster", run_main),
        ("server.plan", run_forked),  # this one and the next two import torch first
        ("training.fit", run_forked),
        ("lori", run_forked),
    ],
)
def test_every_program_says_its_version(module: str, run: RunProgram, tmp_path: Path) -> None:
    process = run(tmp_path / "log", "--version", module=module)
    assert process.wait(LIMIT_S) == 0
    assert (tmp_path / "log").read_text() == f"lori-server {package_version()}\n"


def sections_of_help(module: str) -> Mapping[str, list[str]]:
    """Return the flags under each heading of a program's --help. Fail if a line is longer than 80 columns."""
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert max(map(len, done.stdout.splitlines())) <= 80
    sections: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if heading := re.fullmatch(r"(\w.*):", line):
            sections[heading[1]] = []
        elif flag := re.match(r"  (?:-h, )?(--[\w-]+)", line):
            sections[list(sections)[-1]].append(flag[1])
    return sections


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "settings", "groups"),
    [
        ("server", Settings, GROUPS),
        ("server.cluster", ClusterSettings, GROUPS),
        ("training.fit", FitConfig, FitConfig.GROUPS),
    ],
)
def test_the_help_is_in_groups_with_ten_main_flags_first(
    module: str, settings: type[BaseSettings], groups: Mapping[str, Sequence[str]]
) -> None:
    sections = sections_of_help(module)
    headings = [heading for heading in groups if set(groups[heading]) & settings.model_fields.keys()]
    assert list(sections) == ["options", *headings]
    assert sections.pop("options") == ["--help", "--version"], "every other flag is under a heading"
    assert len(sections[headings[0]]) == 10
    flags = [flag for section in sections.values() for flag in section]
    assert sorted(flags) == sorted("--" + name.replace("_", "-") for name in settings.model_fields)


@pytest.mark.parametrize(("settings", "groups"), [(ClusterSettings, GROUPS), (FitConfig, FitConfig.GROUPS)])
def test_the_headings_name_existing_flags(settings: type[BaseSettings], groups: Mapping[str, Sequence[str]]) -> None:
    named = [field for fields in groups.values() for field in fields]
    assert len(named) == len(set(named))
    assert set(named) <= settings.model_fields.keys()
