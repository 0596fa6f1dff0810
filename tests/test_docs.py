"""README and docs/: the commands have the effects that the pages describe, and the links have targets."""

import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import openai
import pytest

from lori.cli import program as lori_program
from lori.resources import threads_restored
from lori.store.store import AdapterStore
from server.loading import load_service
from server.plan import __main__ as plan_program
from server.settings import Settings
from tests.docs.clone import make_clone
from tests.docs.pages import BLOCK, EXAMPLES, LOCAL, PAGES, ROOT, Block, all_blocks, blocks, curls_and_replies
from tests.file_list import file_list
from tests.server.live import Live, events, serve_here, start
from training import fit as fit_program

LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
PROGRAMS: Mapping[str, Callable[[], int]] = {
    "lori": lori_program.main,
    "server.plan": plan_program.main,
    "training.fit": fit_program.main,
}
"""The functions that `python -m` runs, by module."""
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Yield a server started by README's first command, on a free port."""
    with start(tmp_path_factory.mktemp("demo") / "log") as server:
        yield server


def test_the_pages_have_a_curl_for_each_form_of_adapter() -> None:
    bodies = [json.loads(shlex.split(curl)[-1]) for curl, _ in curls_and_replies()]
    forms = {type(body.get("adapter")) for body in bodies}
    assert forms >= {type(None), str, list}
    assert any("weights" in body for body in bodies)


def within(shown: Any, reply: Any) -> Any:
    """Return the parts of `reply` that the page shows. The pages shorten replies."""
    if isinstance(shown, dict) and isinstance(reply, dict):
        return {key: within(value, reply[key]) for key, value in shown.items() if key in reply}
    if isinstance(shown, list) and isinstance(reply, list):
        return [within(*both) for both in zip(shown, reply, strict=True)]
    return reply


@pytest.mark.parametrize(("curl", "shown"), curls_and_replies())
def test_a_curl_gives_the_answer_shown(demo: Live, curl: str, shown: str) -> None:
    words = shlex.split(curl)
    [url] = [word for word in words if word.startswith(LOCAL)]
    headers = dict(h.split(": ") for flag, h in itertools.pairwise(words) if flag == "-H")
    reply = demo.client.post(url.removeprefix(LOCAL), content=words[-1], headers=headers)
    if "event: " in shown:
        actual, expected = list(events(reply.text.splitlines())), list(events([*shown.splitlines(), ""]))
        assert [name for name, _ in actual] == [name for name, _ in expected]
        assert [data.get("text") for _, data in actual] == [data.get("text") for _, data in expected]
    else:
        actual, expected = reply.json(), json.loads(shown)
        assert within(expected, actual) == expected


def test_the_client_examples_run(demo: Live, capsys: pytest.CaptureFixture[str]) -> None:
    """Regression: one example lacked the name of its `prompt` argument."""
    by_openai, by_ours = (code for language, code in blocks("api.md", "With the clients you have") if language == "python")
    url = str(demo.client.base_url).rstrip("/")
    exec(by_openai.replace(LOCAL, url), {})
    assert capsys.readouterr().out == " 2 + 3 = <<2+3=5>>5\n"
    exec(by_ours.replace(LOCAL, url), {})
    assert capsys.readouterr().out == " card arrival\n"


@pytest.mark.parametrize("block", all_blocks("python"), ids=str)
def test_code_of_the_pages_runs(demo: Live, block: Block) -> None:
    url = str(demo.client.base_url).rstrip("/")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        # Names from earlier blocks, which later blocks use.
        exec(block.text.replace(LOCAL, url), {"client": client, "messages": [{"role": "user", "content": "What is 2 + 3?"}]})


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        ("openai_client.py", ["  math\n", "math:1+safety:0.8: '", " tokens\n", "404: {"]),
        ("merging.py", ["[1.0, 0.1]: ", "method='ties' density=0.7", "math@", "the versions are the same: True"]),
    ],
)
def test_an_example_prints_the_expected_output(demo: Live, tmp_path: Path, example: str, expected: list[str]) -> None:
    texts = {LOCAL: demo.url, "max_tokens=48": "max_tokens=12"}
    output = make_clone(tmp_path, texts).run(f".venv/bin/python {EXAMPLES.relative_to(ROOT) / example}")
    assert [text for text in expected if text not in output] == [], output


def run(monkeypatch: pytest.MonkeyPatch, command: str, *more: str) -> None:
    """Run a command of the pages, with the flags `more`, in this process. It must succeed."""
    python, option, module, *flags = shlex.split(command)
    assert (python, option) == (".venv/bin/python", "-m")
    monkeypatch.setattr(sys, "argv", [module, *flags, *more])
    with pytest.raises(SystemExit) as end:
        sys.exit(PROGRAMS[module]())
    assert not end.value.code, command


@pytest.mark.slow
def test_the_commands_on_adapters_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first command runs in a process of its own, the others in the test process."""
    shutil.copytree(ROOT / "server" / "adapters", tmp_path / "server" / "adapters")
    first, *others = blocks("adapters-and-merging.md", "Keep, merge and move adapters")[0][1].splitlines()
    command = shlex.split(first.replace(".venv/bin/python", sys.executable))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), first
    monkeypatch.chdir(tmp_path)
    for line in others:
        run(monkeypatch, line)
        assert capsys.readouterr().err == "", line
    assert {entry.name for entry in AdapterStore(tmp_path / "adapters").list()} == {"both", "again"}
    assert AdapterStore(tmp_path / "elsewhere").find("both").load()
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("math.png", "cosines.png"))


@pytest.mark.model
def test_a_trained_adapter_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    first = blocks("training.md", "Train your own")[0][1]
    fit, serve = first.splitlines()
    rows = [{"prompt": f"Q: {i}?\nA:", "completion": " forty-two"} for i in range(4)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    with threads_restored():
        # The four rows have at most 100 tokens, but they are repeated.
        run(monkeypatch, fit.replace(re.findall(r"--steps \d+", fit)[0], "--steps 2"), "--batch-tokens", "100")
    assert capsys.readouterr().out.endswith("saved adapters/my\n")
    assert shlex.split(serve)[1:] == ["-m", "server", "--adapters", "adapters"]
    with serve_here(load_service(Settings(adapters="adapters", kv_cache_gib=0.1))) as client:
        names = [adapter["name"] for adapter in client.get("/adapters").json()["adapters"]]
        assert names == ["intent", "math", "my", "nlu", "safety"]
        reply = client.post("/generate", json={"prompt": "Q: 1?\nA:", "adapter": "my", "max_tokens": 4})
        assert reply.json()["adapter"][0]["name"] == "my", reply.text


def test_the_plan_prints_the_lines_that_the_page_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, simulation = (code for language, code in blocks("deployment.md", "Plan a deployment") if language == "bash")
    run(monkeypatch, plan)
    [shown] = [code for language, code in blocks("deployment.md", "Plan a deployment") if language == "text"]
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in shown.splitlines() if line not in printed] == []
    run(monkeypatch, simulation, "--requests", "500")
    assert "500 requests at 40 a second for 100,000 adapters, zipf 1" in capsys.readouterr().out


def test_readme_repeats_commands_of_the_pages() -> None:
    """Tests run these commands of README in the pages that repeat them."""
    assert blocks("README.md", "With the clients you have")[0] in blocks("api.md", "With the clients you have")
    assert blocks("README.md", "Train your own")[0] == blocks("training.md", "Train your own")[0]


def test_readme_is_a_page() -> None:
    text = PAGES["README.md"].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 180
    assert len(text.encode()) <= 12_000
    assert len(PAGES["architecture.md"].read_text(encoding="utf-8").splitlines()) <= 150


def anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_have_targets(page: str) -> None:
    path = PAGES[page]
    for target, fragment in LINK.findall(BLOCK.sub("", path.read_text(encoding="utf-8"))):
        linked = (path.parent / target).resolve() if target else path
        assert linked.exists(), target
        assert linked.is_relative_to(ROOT), target
        if fragment:
            headings = HEADING.findall(BLOCK.sub("", linked.read_text(encoding="utf-8")))
            assert fragment in {anchor(heading) for heading in headings}, f"{target}#{fragment}"


def test_the_list_of_files_is_the_generated_one() -> None:
    assert (ROOT / "docs" / "files.md").read_text(encoding="utf-8") == file_list(), "run: python -m tests.file_list"
