"""Prompts that two adapters are needed for: one knows what to answer, the other in which manner. Through a server.

    python -m tests.bench.composites --data data --content intent --manner json --is json --url URL [--first 150] [--num-rows 300]

`content` is a demo adapter (`intent`, `nlu` or `math`), and its prompts are its test rows, as plain prompts or, with `--template
chat`, as messages. `manner` is an adapter whose answers are of the form that `--is` names: `upper`, all letters capitals; `json`,
an object whose one key is `answer`. A line for each setting: the base, each adapter alone, and both at `--weights` of each; a
weight may be `auto`, and no weights are the server's default. Its figures: the fraction of answers that are in the manner, that
say what is right, and both; and the same over the rows (`num_possible`) whose content the content adapter alone has right, and
whose manner the manner adapter alone has right. `intent` is right if it is the label, `nlu` if it is the completion, both but for
case, and `math` if the last number is right.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lori.template import Template
from tests.bench.demo import show
from training.evaluation.metrics import number_in
from training.evaluation.server_answerer import Ask, Server

MAX_TOKENS = {"intent": 48, "nlu": 48, "math": 160}
Weights = tuple[float | Literal["auto"], ...]


def in_capitals(text: str) -> str | None:
    """Return the content of an answer in capitals, or None."""
    return text.strip() if text.isupper() else None


def in_json(text: str) -> str | None:
    """Return the content of an answer as JSON, `{"answer": content}`, or None."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value["answer"] if isinstance(value, dict) and [*value] == ["answer"] and isinstance(value["answer"], str) else None


MANNERS: Mapping[str, Callable[[str], str | None]] = {"upper": in_capitals, "json": in_json}


def is_right(task: str, row: Mapping[str, Any], content: str) -> bool:
    """Return whether the content of an answer to a row of `task` is right."""
    if task == "math":
        return number_in(content) == number_in(row["answer"])
    return content.strip().casefold() == row["completion"].strip().casefold()


def answers(url: str, rows: Sequence[Mapping[str, Any]], template: Template, fields: Mapping[str, Any]) -> list[str]:
    """Return the greedy answer to each row's prompt."""

    async def answer(ask: Ask, row: Mapping[str, Any]) -> str:
        messages = {"messages": [{"role": "user", "content": row["prompt"]}], "template": template}
        prompt = {"prompt": row["prompt"]} if template == "plain" else messages
        return str((await ask("/generate", {**prompt, **fields, "temperature": 0}))["text"])

    return Server(url).ask_all(answer, rows)


def parse_weights(text: str) -> Weights:
    """Return the weights of a text such as `1,0.8` or `auto,1`."""
    return tuple("auto" if part == "auto" else float(part) for part in text.split(","))


def main() -> int:
    """Run the program and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--content", choices=list(MAX_TOKENS), default="intent")
    parser.add_argument("--manner", required=True, help="the adapter of the manner")
    parser.add_argument("--is", dest="kind", choices=list(MANNERS), required=True, help="what its answers are")
    parser.add_argument("--template", choices=("plain", "chat"), default="plain")
    parser.add_argument("--first", type=int, default=0, help="the first test row")
    parser.add_argument("--num-rows", type=int, default=300)
    parser.add_argument("--weights", nargs="*", type=parse_weights, default=[(1.0, 1.0), (0.5, 0.5), ("auto", 1.0)])
    arguments = parser.parse_args()
    task, content_of = arguments.content, MANNERS[arguments.kind]
    lines = (arguments.data / task / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines][arguments.first :][: arguments.num_rows]
    names = [task, arguments.manner]
    limits = {"max_tokens": MAX_TOKENS[task]}

    def marks(fields: Mapping[str, Any]) -> list[tuple[bool, bool, bool]]:
        # Of each answer: is it in the manner, is its content right whatever the manner, and both.
        marked = []
        for row, text in zip(rows, answers(arguments.url, rows, arguments.template, fields | limits), strict=True):
            content = content_of(text)
            is_content_right = is_right(task, row, text if content is None else content)
            marked.append((content is not None, is_content_right, content is not None and is_content_right))
        return marked

    alone = [marks({"adapter": name}) for name in names]
    possible = [content[1] and manner[0] for content, manner in zip(*alone, strict=True)]

    def line(setting: str, marked: Sequence[tuple[bool, bool, bool]]) -> dict[str, Any]:
        means = {name: statistics.fmean(mark[i] for mark in marked) for i, name in enumerate(("manner", "content", "both"))}
        kept = [mark for mark, is_possible in zip(marked, possible, strict=True) if is_possible]
        both_of_possible = statistics.fmean(mark[2] for mark in kept) if kept else None
        return {"setting": setting, **means, "both_of_possible": both_of_possible, "num_possible": len(kept), "rows": len(rows)}

    show(line("base", marks({})))
    for name, marked in zip(names, alone, strict=True):
        show(line(name, marked))
    show(line("default", marks({"adapter": names})))
    for weights in arguments.weights:
        label = "+".join(f"{name}:{weight}" for name, weight in zip(names, weights, strict=True))
        show(line(label, marks({"adapter": names, "weights": weights})))
    return 0


if __name__ == "__main__":
    sys.exit(main())
