"""Code and prose of Python's standard library, as prompts that are no adapter's."""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

MODULES = (
    "argparse",
    "calendar",
    "csv",
    "datetime",
    "decimal",
    "difflib",
    "fractions",
    "heapq",
    "ipaddress",
    "pathlib",
    "statistics",
)
"""Modules with many documented functions."""
ASKED = ("", "Complete this function:\n", "What does this code do?\n", "Fix this code:\n")
MAX_CHARACTERS = 600


def code_prompts() -> Iterator[dict[str, str]]:
    """Yield prompts with the beginning of a function, asked in several ways."""
    functions = [(source, node) for source, tree in _modules() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for number, (source, node) in enumerate(functions):
        text = ast.get_source_segment(source, node) or ""
        if len(text) > 80:
            yield {"prompt": ASKED[number % len(ASKED)] + text[: MAX_CHARACTERS // (1 + number % 3)]}


def prose() -> Iterator[dict[str, str]]:
    """Yield paragraphs of docstrings, each once."""
    docstrings = [
        ast.get_docstring(node) or ""
        for _, tree in _modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module)
    ]
    paragraphs = dict.fromkeys(" ".join(part.split()) for text in docstrings for part in text.split("\n\n") if ">>>" not in part)
    yield from ({"prompt": text} for text in paragraphs if 30 < len(text) < MAX_CHARACTERS)


def _modules() -> Iterator[tuple[str, ast.Module]]:
    for name in MODULES:
        source = (Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text(encoding="utf-8")
        yield source, ast.parse(source)
