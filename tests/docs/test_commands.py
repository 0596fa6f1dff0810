"""Commands of the documentation: a test runs or checks each of them, or there is a reason why not."""

import re
from pathlib import Path

import pytest

from server.access.keys import parse_keys
from tests.docs.commands import NOT_CHECKED, UncheckedError, check, check_mention, commands
from tests.docs.pages import BLOCK, LOCAL, PAGES, ROOT, Block, admin_curls, all_blocks, curls_and_replies
from training.study.config import StudyConfig

COMMAND = re.compile(r"^\s*(\$ |\.venv/|curl |docker |pip |python)", re.MULTILINE)
INLINE = re.compile(r"`(?:\.venv/bin/)?(python\s+-m\s[^`]+)`")
SCRIPTS = all_blocks("bash")


FOLDERS = ("adapters/both", "both-peft", "data", "elsewhere", "runs/my")
FILES = ("both.lori", "my.lori")
"""Paths that programs look for when they read their command line."""


@pytest.fixture
def _readers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to a folder with the files that a reader of the pages has."""
    for folder in FOLDERS:
        (tmp_path / folder).mkdir(parents=True)
    for file in FILES:
        (tmp_path / file).touch()
    (tmp_path / "my.yaml").write_text("steps: 5")
    (tmp_path / "server").symlink_to(ROOT / "server")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_readers_folder")
@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_a_command_is_accepted_by_its_program(script: Block) -> None:
    for words in commands(script.text):
        if words[0] != "curl":
            check(words)


def test_every_request_is_sent_by_a_test() -> None:
    """`tests/test_docs.py` sends the requests with a reply, `tests/docs/test_examples.py` those of an admin."""
    sent = {curl for curl, _ in curls_and_replies()} | {block.text for block in admin_curls()}
    assert [str(block) for block in SCRIPTS if "curl" in block.text and block.text not in sent] == []


def inline_commands() -> list[tuple[str, str]]:
    """Return page and text of each `python -m …` within the pages' prose."""
    pairs = [
        (page, command) for page, path in PAGES.items() for command in INLINE.findall(BLOCK.sub("", path.read_text("utf-8")))
    ]
    return list(dict.fromkeys((page, " ".join(command.split())) for page, command in pairs))


@pytest.mark.usefixtures("_readers_folder")
@pytest.mark.parametrize(("page", "command"), inline_commands())
def test_a_command_in_a_sentence_is_accepted_by_its_program(page: str, command: str) -> None:  # noqa: ARG001  # the page is for the test's name
    [words] = commands(command)
    check_mention(words)


def test_commands_stand_in_blocks_that_the_tests_read() -> None:
    others = [block for block in all_blocks() if block.language not in ("bash", "python")]
    assert {block.language for block in others} <= {"", "json", "text", "toml", "yaml"}
    assert [str(block) for block in others if COMMAND.search(block.text)] == []


def test_an_unknown_program_is_found() -> None:
    with pytest.raises(UncheckedError, match="unknown-program --flag"):
        check(["unknown-program", "--flag"])


@pytest.mark.parametrize(
    "command",
    [
        ".venv/bin/python -m server --adaptors x",
        ".venv/bin/python -m server.plan --adapters 10",
        ".venv/bin/python -m training.fit --data my.jsonl --output adapters/my --step 1",
        ".venv/bin/torchrun --nproc-per-node 2 -m training.fit --data my.jsonl",
        ".venv/bin/torchrun --processes 2 -m training.fit --data my.jsonl --output adapters/my",
    ],
)
def test_a_wrong_flag_is_found(command: str) -> None:
    [words] = commands(command)
    with pytest.raises(SystemExit):
        check(words)


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        (".venv/bin/python -m server.keys keys.toml --role nobody", "nobody"),
        (".venv/bin/python -m lori list adapters --short", "--short"),
        (".venv/bin/python -m lori lists", "lists"),
        (".venv/bin/python -m tests.bench.store --adaptors 10", "--adaptors"),
        (".venv/bin/pip install '.[cloud]'", "cloud"),
        (".venv/bin/pip install unheard-of", "unheard-of"),
        ("docker compose --profile metrics up", "metrics"),
        ("docs/examples/no-such.sh", "no-such"),
    ],
)
def test_a_wrong_name_is_found(command: str, fault: str) -> None:
    [words] = commands(command)
    with pytest.raises(Exception, match=fault):
        check(words)


def test_a_script_is_read_as_the_shell_reads_it() -> None:
    script = "KEY=$(make --it) && A=1 run 'a b' > file\nfor x in 1 2; do send \"$x\" \\\n  on; done &\n"
    read = [["KEY=$"], ["make", "--it"], ["run", "a b"], ["for", "x", "in", "1", "2"], ["do", "send", "$x", "on"], ["done"]]
    assert commands(script) == [words for words in read if words != ["KEY=$"]]


def test_every_unchecked_program_appears_in_the_pages() -> None:
    programs = {words[0].removeprefix(".venv/bin/") for script in SCRIPTS for words in commands(script.text)}
    assert programs >= NOT_CHECKED.keys()


def test_the_key_file_of_the_page_is_valid() -> None:
    [shown] = all_blocks("toml")
    assert parse_keys(shown.text.encode(), str(shown)).tenants["acme"].policy == (("safety", 0.5),)


def test_the_study_recipe_of_the_page_is_valid(tmp_path: Path) -> None:
    [shown] = all_blocks("yaml")
    (tmp_path / "mine.yaml").write_text(shown.text)
    config = StudyConfig(data=tmp_path, output=tmp_path / "out", recipe=str(tmp_path / "mine.yaml"))
    assert {*config.tasks} == {"colours", "sums"}


def test_pages_use_one_server_address() -> None:
    assert {match for block in all_blocks("python") for match in re.findall(r"http://[\w.:]+", block.text)} == {LOCAL}
