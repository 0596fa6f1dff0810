"""Pages of the documentation and their code blocks."""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
EXAMPLES = DOCS / "examples"
PAGES = {
    **{path.name: path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md")},
    **{str(path.relative_to(DOCS)): path for path in sorted(DOCS.rglob("*.md"))},
}
"""README.md and CONTRIBUTING.md by their names, the pages of docs/ by their paths in it."""
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
LOCAL = "http://localhost:8000"
"""The server's address in the pages."""


@dataclass(frozen=True, slots=True)
class Block:
    """A code block of a page."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def section(page: str, title: str) -> str:
    """Return the text under a heading of a page."""
    match = re.search(
        rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGES[page].read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert match, f"{page}: {title}"
    return match[1]


def blocks(page: str, title: str) -> list[tuple[str, str]]:
    """Return language and text of each code block under a heading."""
    return [(match[2], dedent(match[3])) for match in BLOCK.finditer(section(page, title))]


def all_blocks(*languages: str) -> list[Block]:
    """Return the code blocks of all pages; only those in `languages` if there are any."""
    return [
        Block(page, text.count("\n", 0, match.start()) + 1, match[2], dedent(match[3]))
        for page, text in ((page, path.read_text(encoding="utf-8")) for page, path in PAGES.items())
        for match in BLOCK.finditer(text)
        if not languages or match[2] in languages
    ]


def curls_and_replies() -> list[tuple[str, str]]:
    """Return each curl of the pages with the reply shown below it, without repetitions."""
    merging = "adapters-and-merging.md"
    places = (
        ("README.md", "Ask it"),
        ("api.md", "Ask it"),
        (merging, "Automatic weights"),
        (merging, "The server selects the adapters"),
    )
    pairs = (pair for place in places for pair in itertools.pairwise(blocks(*place)))
    return list(dict.fromkeys((curl, reply) for (_, curl), (_, reply) in pairs if curl.startswith("curl")))


def admin_curls() -> list[Block]:
    """Return the blocks of all pages with requests that send an admin's key."""
    return [block for block in all_blocks("bash") if "curl " in block.text and "$KEY" in block.text]
