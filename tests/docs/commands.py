"""Checks of the pages' commands without running them: flags by each program's own parser, extras and files by name."""

import ast
import importlib.util
import itertools
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer
from torch.distributed.run import get_args_parser
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from lori.cli.program import app
from server.arguments import GROUPS, read_arguments
from server.cluster.settings import ClusterSettings
from server.keys import make_key
from server.plan.config import PlanConfig
from server.settings import Settings
from tests.docker.compose import read
from tests.docs.pages import EXAMPLES, ROOT
from training.answer import AnswerConfig
from training.background import BackgroundConfig
from training.calibrate import CalibrateConfig
from training.chats import ChatsConfig
from training.config import FitConfig
from training.demo.__main__ import DemoConfig
from training.evaluation.config import EvaluateConfig
from training.study.config import StudyConfig
from training.tune import TuneConfig

BREAK = re.compile(r"[();<>|&\n]+")
"""Tokens that end a command of a script."""
ASSIGNMENT = re.compile(r"\w+=")
BIN = ".venv/bin/"
"""The programs of the environment, as the pages call them."""
SETTINGS: Mapping[str, Callable[[], object]] = {
    "server": lambda: read_arguments(Settings, GROUPS),
    "server.cluster": lambda: read_arguments(ClusterSettings, GROUPS),
    "server.plan": PlanConfig.from_arguments,
    "training.answer": AnswerConfig.from_arguments,
    "training.background": BackgroundConfig.from_arguments,
    "training.calibrate": CalibrateConfig.from_arguments,
    "training.chats": ChatsConfig.from_arguments,
    "training.demo": DemoConfig.from_arguments,
    "training.evaluate": EvaluateConfig.from_arguments,
    "training.fit": FitConfig.from_arguments,
    "training.tune": TuneConfig.from_arguments,
    "training.study": StudyConfig.from_arguments,
}
"""Functions that read the command line of a module's program."""
SHELL = {"mkdir", "cp", "chmod", "export", "for", "do", "done"}
NOT_CHECKED = {
    "hf": "uploads to the hub",
    "lm_eval": "fetches its task from the hub; tests/server/client/test_lm_eval.py runs it on tasks of its own",
    "vllm-router": "tests/docker/test_compose.py compares its flags with compose's, which tests/server/test_vllm_router.py runs",
    "ruff": "run by .ci/run",
    "mypy": "run by .ci/run",
    "pytest": "run by .ci/run; takes an hour",
}
"""Programs whose arguments no test of the pages checks, and why."""


class UncheckedError(AssertionError):
    """A command of a page that no test runs or checks."""


def commands(script: str) -> list[list[str]]:
    """Return the words of each command of a shell script, without assignments and redirections."""
    lexer = shlex.shlex(script.replace("\\\n", " "), posix=True, punctuation_chars="();<>|&\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, "#"
    parts: list[list[str]] = [[]]
    for word in lexer:
        if BREAK.fullmatch(word):
            parts.append([word] if ">" in word else [])
        else:
            parts[-1].append(word)
    stripped = (_without_assignments(words) for words in parts if words[:1] != [">"])
    return [words for words in stripped if words]


def _without_assignments(words: Sequence[str]) -> list[str]:
    first = next((place for place, word in enumerate(words) if not ASSIGNMENT.match(word)), len(words))
    return list(words[first:])


def check(words: Sequence[str]) -> None:
    """Raise an error, or end as the program would, if a command is wrong. Raises `UncheckedError` for an unknown program."""
    program, arguments = words[0].removeprefix(BIN), words[1:]
    if program in ("python", "python3"):
        _check_python(arguments)
    elif program == "torchrun":
        options = get_args_parser().parse_args(list(arguments))
        assert options.module, "torchrun starts a module"
        check_module(options.training_script, options.training_script_args)
    elif program == "pip":
        _check_install(arguments)
    elif program == "docker":
        _check_compose(arguments)
    elif (ROOT / program).is_relative_to(EXAMPLES):
        assert (ROOT / program).is_file(), program
    elif program not in SHELL and program not in NOT_CHECKED:
        raise UncheckedError(f"{shlex.join(words)}: run it in a test, or give a reason in NOT_CHECKED of {__name__}")


def _check_python(arguments: Sequence[str]) -> None:
    if arguments[0] != "-m":
        check([arguments[0]])
    elif arguments[1] != "venv":
        check_module(arguments[1], arguments[2:])


def check_module(module: str, arguments: Sequence[str]) -> None:
    """End as `python -m module` would if its arguments are wrong. Raises `typer`'s own errors for a program of `typer`."""
    with _command_line(module, *arguments):
        if module in SETTINGS:
            SETTINGS[module]()
        elif module == "server.keys":
            keys = typer.Typer()
            keys.command()(make_key)
            get_command(keys).make_context(module, list(arguments))
        elif module == "lori":
            verb_of(arguments[0]).make_context(arguments[0], list(arguments[1:]))
        else:
            _check_by_source(module, arguments)


def check_mention(words: Sequence[str]) -> None:
    """Check a command that a sentence names: its module, and its flags if it has any argument."""
    module, arguments = words[2], words[3:]
    if module == "lori" and len(arguments) == 1:
        verb_of(arguments[0])
    elif arguments in ([], ["--help"]):
        assert importlib.util.find_spec(module), module
    else:
        check_module(module, arguments)


def verb_of(name: str) -> TyperCommand:
    """Return a verb of `python -m lori`."""
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    verb = group.commands[name]
    assert isinstance(verb, TyperCommand)
    return verb


@contextmanager
def _command_line(*words: str) -> Iterator[None]:
    before, sys.argv = sys.argv, [*words]
    try:
        yield
    finally:
        sys.argv = before


def _check_by_source(module: str, arguments: Sequence[str]) -> None:
    # These modules are slow to import and parse their flags in main(), so the flags are compared with those in the source.
    spec = importlib.util.find_spec(module)
    assert spec, module
    assert spec.origin, module
    calls = [node for node in ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    added = [call.args[0] for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"]
    flags = {node.value for node in added if isinstance(node, ast.Constant)}
    unknown = [word for word in arguments if word.startswith("--") and " " not in word and word not in flags]
    assert not unknown, f"{module} has no flag {', '.join(unknown)}"


def _check_install(arguments: Sequence[str]) -> None:
    assert arguments[0] == "install"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    packages = {re.split(r"[^\w-]", line)[0] for lines in [project["dependencies"], *extras.values()] for line in lines}
    for word in arguments[1:]:
        name, _, listed = word.removesuffix("]").partition("[")
        if word != "-e" and name != ".":
            assert name in packages, f"{name}: no test uses it"
        elif listed:
            assert listed in extras, f"there is no extra {listed}"


def _check_compose(arguments: Sequence[str]) -> None:
    assert arguments[0] == "compose"
    pairs = list(itertools.pairwise(arguments))
    files = [file for flag, file in pairs if flag == "-f"] or ["docker/compose.yaml"]
    services = [service for file in files for service in read(ROOT / file)["services"].values()]
    known = {profile for service in services for profile in service.get("profiles", ())}
    unknown = {profile for flag, profile in pairs if flag == "--profile"} - known
    assert not unknown, f"{', '.join(files)} have no profile {', '.join(unknown)}"
