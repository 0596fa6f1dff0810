"""Merges of two adapters on prompts that need both: one for the content of the answer, one for its format. Through a server.

    python -m tests.bench.composites --data data --content intent --format json [--url URL] [--first-row 150] [--num-rows 300]

`--content` is a demo adapter; the prompts are its test rows. The adapter of the format has the format's name: `upper`, all
letters capital; `json`, an object whose one key is `answer`; `xml`, an element `answer`. `tests.bench.composite_rows` makes their
training rows. A line for the base, for each adapter alone, for the content's adapter under a grammar of the format, for both
adapters without weights, for both at each of `--weights`, such as `1,0.8` or `auto,1`, and for each of `--merges`. Figures: the
fractions of answers in the format, of correct content, and of both. `both_of_possible` counts only the rows of which each adapter
alone gets its part right. Content is correct if it is the row's completion but for case; that of `math`, if its last number is
the row's answer.

With `--write-rows FILE` it writes training rows with both, for `training.tune`, and asks no server.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, unescape

from lori.template import Template
from server.engine.request import RequestedWeight
from tests.bench.demo import show
from training.evaluation.metrics import number_in
from training.evaluation.server_answerer import Ask, Server

MAX_TOKENS = {"intent": 48, "nlu": 48, "math": 160}
XML_TEXT = "(?:[^<&\n]|&amp;|&lt;|&gt;)+"


def content_in_capitals(text: str) -> str | None:
    """Return the content of an answer whose letters are capital, or None."""
    return text.strip() if text.isupper() else None


def content_in_json(text: str) -> str | None:
    """Return the content of an answer `{"answer": content}`, or None."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value["answer"] if isinstance(value, dict) and [*value] == ["answer"] and isinstance(value["answer"], str) else None


def content_in_xml(text: str) -> str | None:
    """Return the content of an answer `<answer>content</answer>` of one line, or None."""
    match = re.fullmatch(rf"\s*<answer>({XML_TEXT})</answer>\s*", text)
    return unescape(match[1]) if match else None


SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "string"}},
    "required": ["answer"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class Format:
    """A format of answers."""

    write: Callable[[str], str]
    """Returns an answer with a content."""
    read: Callable[[str], str | None]
    """Returns the content of an answer, or None if the answer has another format."""
    grammar: Mapping[str, Any]
    """The `grammar` of a request."""


FORMATS: Mapping[str, Format] = {
    "upper": Format(str.upper, content_in_capitals, {"type": "regex", "pattern": " ?[^a-z]+"}),
    "json": Format(
        lambda content: json.dumps({"answer": content}, ensure_ascii=False),
        content_in_json,
        {"type": "json_schema", "schema": SCHEMA},
    ),
    "xml": Format(
        lambda content: f"<answer>{escape(content)}</answer>",
        content_in_xml,
        {"type": "regex", "pattern": f" ?<answer>{XML_TEXT}</answer>"},
    ),
}


@dataclass(frozen=True, slots=True)
class Mark:
    """What is right about an answer."""

    is_formatted: bool
    is_correct: bool
    """Whether the content is correct; of an answer that is not in the format, the whole text."""

    @property
    def is_both(self) -> bool:
        """Whether a correct content is in the format."""
        return self.is_formatted and self.is_correct


@dataclass(frozen=True, slots=True)
class Composite:
    """Prompts that need the adapter `task` for the content and the adapter `format` for the format of their answers."""

    server: Server
    task: str
    format: str
    rows: Sequence[Mapping[str, Any]]
    template: Template

    def marks(self, fields: Mapping[str, Any]) -> list[Mark]:
        """Return the mark of the greedy answer to each row, to requests with these fields."""

        async def mark(ask: Ask, row: Mapping[str, Any]) -> Mark:
            messages = {"messages": [{"role": "user", "content": row["prompt"]}], "template": self.template}
            prompt = {"prompt": row["prompt"]} if self.template == "plain" else messages
            reply = await ask("/generate", {**prompt, **fields, "max_tokens": MAX_TOKENS[self.task], "temperature": 0})
            content = FORMATS[self.format].read(reply["text"])
            return Mark(content is not None, is_correct(self.task, row, reply["text"] if content is None else content))

        return self.server.ask_all(mark, self.rows)

    def compare(self, settings: Sequence[tuple[RequestedWeight, ...]], merges: Sequence[str]) -> None:
        """Print a line for each setting, and for each named merge."""
        names = (self.task, self.format)
        alone = [self.marks({"adapter": name}) for name in names]
        possible = [content.is_correct and form.is_formatted for content, form in zip(*alone, strict=True)]

        def show_line(setting: str, marks: Sequence[Mark]) -> None:
            possible_marks = [mark for mark, is_possible in zip(marks, possible, strict=True) if is_possible]
            line = {
                "format": statistics.fmean(mark.is_formatted for mark in marks),
                "content": statistics.fmean(mark.is_correct for mark in marks),
                "both": statistics.fmean(mark.is_both for mark in marks),
                "both_of_possible": statistics.fmean(mark.is_both for mark in possible_marks) if possible_marks else None,
            }
            show({"setting": setting, **line, "num_possible": len(possible_marks), "num_rows": len(marks)})

        show_line("base", self.marks({}))
        for name, marks in zip(names, alone, strict=True):
            show_line(name, marks)
        show_line(f"{self.task}, grammar", self.marks({"adapter": self.task, "grammar": FORMATS[self.format].grammar}))
        show_line("+".join(names), self.marks({"adapter": names}))
        for weights in settings:
            setting = "+".join(f"{name}:{weight}" for name, weight in zip(names, weights, strict=True))
            show_line(setting, self.marks({"adapter": names, "weights": weights}))
        for merge in merges:
            show_line(merge, self.marks({"adapter": merge}))


def is_correct(task: str, row: Mapping[str, Any], content: str) -> bool:
    """Return whether `content` answers a row of `task`."""
    if task == "math":
        return number_in(content) == number_in(row["answer"])
    return content.strip().casefold() == str(row["completion"]).strip().casefold()


def row_of(arguments: argparse.Namespace, row: Mapping[str, Any]) -> dict[str, str]:
    """Return a row whose completion has the content of `row` in the format."""
    completion = FORMATS[arguments.format].write(row["completion"].strip())
    space = " " * (arguments.template == "plain")
    return {"prompt": row["prompt"], "completion": space + completion, "template": arguments.template}


def parse_weights(text: str) -> tuple[RequestedWeight, ...]:
    """Return the two weights of a text such as `1,0.8` or `auto,1`."""
    parts = text.split(",")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} has {len(parts)} weights, expected two")
    return tuple("auto" if part == "auto" else float(part) for part in parts)


def main() -> int:
    """Run the program and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--content", choices=list(MAX_TOKENS), required=True)
    parser.add_argument("--format", choices=list(FORMATS), required=True)
    parser.add_argument("--template", choices=("plain", "chat"), default="plain")
    parser.add_argument("--first-row", type=int, default=0)
    parser.add_argument("--num-rows", type=int, default=300)
    parser.add_argument("--merges", nargs="*", default=[], help="named merges of the server, such as one that was tuned")
    parser.add_argument(
        "--write-rows", type=Path, metavar="FILE", help="write training rows with answers that have both, to tune"
    )
    parser.add_argument("--weights", nargs="*", type=parse_weights, default=[(1.0, 1.0), (0.5, 0.5), ("auto", 1.0)])
    arguments = parser.parse_args()
    split = "train" if arguments.write_rows else "test"
    with (arguments.data / arguments.content / f"{split}.jsonl").open(encoding="utf-8") as file:
        lines = [*file]  # `splitlines` would also end lines at characters that JSON strings may have
    rows = [json.loads(line) for line in lines[arguments.first_row :][: arguments.num_rows]]
    if arguments.write_rows:
        arguments.write_rows.write_text("".join(json.dumps(row_of(arguments, row)) + "\n" for row in rows), encoding="utf-8")
        return 0
    composite = Composite(Server(arguments.url), arguments.content, arguments.format, rows, arguments.template)
    composite.compare(arguments.weights, arguments.merges)
    return 0


if __name__ == "__main__":
    sys.exit(main())
