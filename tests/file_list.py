"""The list of files in docs/files.md: a line for each module, from its docstring. `python -m tests.file_list` writes it."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "files.md"
PACKAGES = ("lori", "server", "training")
HEAD = """# Files

Every module with the first paragraph of its docstring. `python -m tests.file_list` writes this page.
[Architecture](architecture.md) says how the files work together.
"""


def file_list() -> str:
    """Return the text of docs/files.md."""
    folders = sorted({path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")})
    return "\n".join([HEAD, *filter(None, map(_table, folders))])


def _table(folder: Path) -> str:
    rows = [
        f"| [{path.name}](../{path.relative_to(ROOT)}) | {summary} |"
        for path in sorted(folder.glob("*.py"))
        if (summary := _summary(path))
    ]
    if not rows:
        return ""
    return "\n".join([f"## {folder.relative_to(ROOT)}", "| file | what it is |", "|---|---|", *rows, ""])


def _summary(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(file_list(), encoding="utf-8")
