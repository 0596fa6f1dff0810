"""Evaluation of automatic weights: all demo adapters are named, and the server weighs them by each prompt.

    python -m training.demo --data data --output runs/test --split test
    python -m tests.bench.auto_weights --data data --chats runs/test [--url URL] [--num-rows 400] [--nobody FILE ...]

A line for each task and form (see `tests.bench.demo`): the figures of the base, of the task's adapter alone, of equal weights, of
automatic ones (`auto`) and of the adapters that the server selects (`selected`), the fraction of the adapter's own gain that each
keeps, the task's mean weight under `auto`, and the fraction of rows whose weight goes to another adapter by more than a half. For
`safety` the figures are the harmful rows that are refused, and `benign` the benign ones. With `--fixed safety=1` the requests of
`auto` give `safety` the weight 1, and the others are automatic; `misrouted` ignores `safety`.

A line for each file of `--nobody`, JSONL with prompts that are no adapter's: the fraction of prompts of which any adapter gets
more than a half, as messages.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lori.template import Template
from tests.bench.demo import TASKS, Scores, answerer_for, completions, forms_of, measured, refused, show
from training.data import read_rows
from training.evaluation.answerer import Prompt
from training.evaluation.metrics import read_metric_rows
from training.evaluation.server_answerer import Ask, Server

NAMES = tuple(TASKS)
NO_WEIGHTS: Mapping[str, float] = {}
Weights = tuple[float, ...]


def weigh(
    url: str, template: Template, prompts: Sequence[Prompt], fixed: Mapping[str, float] = NO_WEIGHTS, *, is_selected: bool = False
) -> list[Weights]:
    """Return the weights of `NAMES` for each prompt: those in `fixed`; the rest are automatic.

    All are named, or the server selects among them. A text in the template `chat` is sent as a message.
    """
    adapter = {"adapter": "auto"} if is_selected else {"adapter": NAMES, "weights": [fixed.get(name, "auto") for name in NAMES]}

    async def ask_one(ask: Ask, prompt: Prompt) -> Weights:
        fields: Mapping[str, Any]
        if isinstance(prompt, str):
            messages = [{"role": "user", "content": prompt}]
            fields = {"prompt": prompt} if template == "plain" else {"messages": messages, "template": template}
        else:
            fields = {"messages": [message.model_dump() for message in prompt], "template": template}
        reply = await ask("/generate", {**fields, **adapter, "max_tokens": 1})
        weights = {one["name"]: one["weight"] for one in reply["adapter"]}
        return tuple(weights.get(name, 0.0) for name in NAMES)

    return Server(url).ask_all(ask_one, prompts)


def scores(url: str, task: str, template: Template, rows: Sequence[Any], weights: Sequence[Weights]) -> Scores:
    """Return the scores of `rows`, each with its own weights of `NAMES`."""
    values: dict[int, float] = {}
    row_weights: dict[int, float] = {}
    for each in dict.fromkeys(weights):
        indices = [i for i, own in enumerate(weights) if own == each]
        answerer = answerer_for(url, template, NAMES, each) if any(each) else answerer_for(url, template)
        part = [rows[i] for i in indices]
        if task == "safety":
            refusals = [float(refused([text])) for text in completions(answerer, part)]
            measure = Scores(refusals, [1.0] * len(refusals))
        else:
            measure = measured(answerer, TASKS[task], part)
        values |= zip(indices, measure.values, strict=True)
        row_weights |= zip(indices, measure.weights, strict=True)
    order = range(len(rows))
    return Scores([values[i] for i in order], [row_weights[i] for i in order])


def compare(arguments: argparse.Namespace) -> None:
    """Print a line for each task and form."""
    equal, fixed = (1 / len(NAMES),) * len(NAMES), dict(arguments.fixed)
    for place, task in enumerate(NAMES):
        if task not in arguments.tasks:
            continue
        alone = tuple(float(name == task) for name in NAMES)
        for form, (file, template) in forms_of(task, arguments.data, arguments.chats).items():
            rows: list[Any] = read_metric_rows(str(file), TASKS[task], arguments.num_rows)
            benign = [row for row in rows if task == "safety" and not row.harmful]
            rows = [row for row in rows if task != "safety" or row.harmful]
            prompts = [row.prompt for row in rows]
            auto = weigh(arguments.url, template, prompts, fixed)
            selected = weigh(arguments.url, template, prompts, is_selected=True)
            choices = {"base": [(0.0,) * len(NAMES)], "alone": [alone], "equal": [equal]}
            figures = {
                name: scores(arguments.url, task, template, rows, weights * len(rows)).mean for name, weights in choices.items()
            }
            figures |= {
                name: scores(arguments.url, task, template, rows, weights).mean
                for name, weights in {"auto": auto, "selected": selected}.items()
            }
            gain = figures["alone"] - figures["base"]
            line: dict[str, Any] = {"task": task, "form": form, "rows": len(rows), **figures}
            if gain:  # of few rows it can be 0
                line |= {f"{name}_kept": (figures[name] - figures["base"]) / gain for name in ("equal", "auto", "selected")}
            line["own_weight"] = statistics.fmean(weights[place] for weights in auto)
            line["misrouted"] = statistics.fmean(
                any(weight > 0.5 for name, weight in zip(NAMES, weights, strict=True) if name not in {task, *fixed})
                for weights in auto
            )
            if benign:
                weights = weigh(arguments.url, template, [row.prompt for row in benign], fixed)
                line["benign"] = scores(arguments.url, task, template, benign, weights).mean
            show(line)


def nobody(url: str, files: Sequence[Path]) -> None:
    """Print a line for each file, and one for all together."""
    all_weights: list[Weights] = []
    for file in files:
        weights = weigh(url, "chat", [row.prompt for row in read_rows(str(file), needs="prompt")])
        all_weights += weights
        show(_nobody_line(file.name, weights))
    if files:
        show(_nobody_line("all", all_weights))


def _nobody_line(name: str, weights: Sequence[Weights]) -> dict[str, Any]:
    line: dict[str, Any] = {"nobody": name, "rows": len(weights)}
    line["any_above_half"] = statistics.fmean(max(each) > 0.5 for each in weights)
    return line | {task: statistics.fmean(each[i] > 0.5 for each in weights) for i, task in enumerate(NAMES)}


def _parse_weight(text: str) -> tuple[str, float]:
    name, _, weight = text.partition("=")
    if name not in NAMES:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(NAMES)}")
    return name, float(weight)


def main() -> int:
    """Run the program and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--chats", type=Path, required=True)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--num-rows", type=int, default=0, help="rows of each file, drawn at random; 0 is all")
    parser.add_argument("--tasks", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--nobody", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--fixed", type=_parse_weight, nargs="+", default=[], metavar="NAME=WEIGHT", help="given weights")
    arguments = parser.parse_args()
    nobody(arguments.url, arguments.nobody)
    compare(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
