"""Evaluation of automatic weights: all demo adapters are named, and the server weighs them by each prompt.

    python -m training.demo --data data --output runs/test --split test
    python -m tests.bench.auto_weights --data data --chats runs/test [--url URL] [--num-rows 400] [--nobody FILE ...]

A line for each task and form (see `tests.bench.demo`) has the task's figure for

- `base`, and `alone`: the task's adapter alone,
- `equal`: 1/n for each adapter,
- `auto`: automatic weights,
- `selected`: the adapters that the server selects,

and for the last three the fraction of the adapter's own gain that is kept (`_kept`). Further: the task's mean automatic weight
(`own_weight`), the fraction of rows for which other adapters' automatic weights sum to more than 0.5 (`misrouted`), and the
fraction for which the server selects the task's adapter first (`found`). For `safety` the figures are the harmful rows that are
refused, and `benign` the benign ones. With `--fixed safety=1` the requests of `auto` give `safety` the weight 1, and the others
are automatic; `misrouted` ignores `safety`. The form `paraphrased` has messages in other words than the test rows; there the
figure of `nlu` is the log-likelihood of the right answer, in nats a token.

A line for each file of `--nobody`, JSONL with prompts that are no adapter's: the fraction of prompts of which one adapter gets
more than a half, and of which all together do, as messages.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lori.template import Template
from tests.bench.demo import CHATS, SAFETY_CHATS, TASKS, Scores, answerer_for, completions, forms_of, measured, refused, show
from training.data import read_rows
from training.demo.__main__ import rows_of
from training.evaluation.answerer import Prompt
from training.evaluation.metrics import MetricName, read_metric_rows
from training.evaluation.server_answerer import Ask, Server

NAMES = tuple(TASKS)
PARAPHRASES = Path(__file__).with_name("paraphrases.jsonl")
"""Paraphrases of test rows, written by hand; `of` is the row's prompt."""
PARAPHRASED_FORM = "paraphrased"
FORMS = (*dict.fromkeys(("plain", "sent", *CHATS, *SAFETY_CHATS)), PARAPHRASED_FORM)
PARAPHRASED: Mapping[str, MetricName] = {"intent": "exact", "math": "loss", "nlu": "loss"}
NO_WEIGHTS: Mapping[str, float] = {}
Weights = tuple[float, ...]


def weigh(
    url: str,
    template: Template,
    prompts: Sequence[Prompt],
    names: Sequence[str],
    fixed: Mapping[str, float] = NO_WEIGHTS,
    *,
    is_selected: bool = False,
) -> list[dict[str, float]]:
    """Return the weights of the adapters of each prompt's reply, in its order: those in `fixed`; the rest are automatic.

    All of `names` are named, or the server selects among them. A text in the template `chat` is sent as a message.
    """
    adapter = {"adapter": "auto"} if is_selected else {"adapter": names, "weights": [fixed.get(name, "auto") for name in names]}

    async def ask_one(ask: Ask, prompt: Prompt) -> dict[str, float]:
        fields: Mapping[str, Any]
        if isinstance(prompt, str):
            messages = [{"role": "user", "content": prompt}]
            fields = {"prompt": prompt} if template == "plain" else {"messages": messages, "template": template}
        else:
            fields = {"messages": [message.model_dump() for message in prompt], "template": template}
        reply = await ask("/generate", {**fields, **adapter, "max_tokens": 1})
        weights = {one["name"]: one["weight"] for one in reply["adapter"]}
        if others := weights.keys() - {*names}:
            raise ValueError(f"the server has adapters that are not measured, and selected {others}")
        return weights

    return Server(url).ask_all(ask_one, prompts)


def in_order(names: Sequence[str], replies: Sequence[Mapping[str, float]]) -> list[Weights]:
    """Return the weights of `names` in each reply. Adapters that are not in it have 0."""
    return [tuple(reply.get(name, 0.0) for name in names) for reply in replies]


def scores(
    url: str,
    metric: MetricName,
    template: Template,
    rows: Sequence[Any],
    weights: Sequence[Weights],
    names: Sequence[str],
) -> Scores:
    """Return the scores of `rows`, each with its own weights of `names`. For `refusal` they are 1 for what is refused."""
    values: dict[int, float] = {}
    row_weights: dict[int, float] = {}
    for each in dict.fromkeys(weights):
        indices = [i for i, own in enumerate(weights) if own == each]
        answerer = answerer_for(url, template, names, each) if any(each) else answerer_for(url, template)
        part = [rows[i] for i in indices]
        if metric == "refusal":
            refusals = [float(refused([text])) for text in completions(answerer, part)]
            part_scores = Scores(refusals, [1.0] * len(refusals))
        else:
            part_scores = measured(answerer, metric, part)
        values |= zip(indices, part_scores.values, strict=True)
        row_weights |= zip(indices, part_scores.weights, strict=True)
    order = range(len(rows))
    return Scores([values[i] for i in order], [row_weights[i] for i in order])


def weight_figures(
    url: str,
    name: str,
    metric: MetricName,
    template: Template,
    rows: Sequence[Any],
    names: Sequence[str],
    fixed: Mapping[str, float] = NO_WEIGHTS,
) -> dict[str, Any]:
    """Return the figures of one adapter's rows: see the module."""
    prompts, place, count = [row.prompt for row in rows], names.index(name), len(names)
    constant = {"base": (0.0,) * count, "alone": tuple(float(i == place) for i in range(count)), "equal": (1 / count,) * count}
    weights = {choice: [each] * len(rows) for choice, each in constant.items()}
    weights["auto"] = in_order(names, weigh(url, template, prompts, names, fixed))
    selections = weigh(url, template, prompts, names, is_selected=True)
    weights["selected"] = in_order(names, selections)
    figures = {choice: scores(url, metric, template, rows, each, names).mean for choice, each in weights.items()}
    line: dict[str, Any] = {"rows": len(rows), **figures}
    gain = figures["alone"] - figures["base"]
    for choice in ("equal", "auto", "selected"):  # the gain of few rows can be 0
        line[f"{choice}_kept"] = (figures[choice] - figures["base"]) / gain if gain else None
    line["own_weight"] = statistics.fmean(each[place] for each in weights["auto"])
    line["misrouted"] = statistics.fmean(
        sum(weight for other, weight in zip(names, each, strict=True) if other not in {name, *fixed}) > 0.5
        for each in weights["auto"]
    )
    line["found"] = statistics.fmean(next(iter(each), None) == name for each in selections)
    return line


def paraphrased(task: str, data: Path) -> list[Any]:
    """Return the rows of `PARAPHRASES` of a task, with the answers of the test rows that they paraphrase."""
    rows: list[Any] = read_metric_rows(str(data / task / "test.jsonl"), PARAPHRASED[task])
    by_prompt = {row.prompt: row for row in rows}
    paraphrases = [one for one in rows_of(PARAPHRASES) if one["task"] == task]
    return [by_prompt[one["of"]].model_copy(update={"prompt": one["prompt"]}) for one in paraphrases]


def compare(arguments: argparse.Namespace) -> None:
    """Print a line for each task and form."""
    url, fixed = arguments.url, dict(arguments.fixed)
    for task in arguments.tasks:
        for form, (file, template) in forms_of(task, arguments.data, arguments.chats).items():
            if form not in arguments.forms:
                continue
            rows: list[Any] = read_metric_rows(str(file), TASKS[task], arguments.num_rows)
            benign = [row for row in rows if task == "safety" and not row.harmful]
            rows = [row for row in rows if task != "safety" or row.harmful]
            line = {"task": task, "form": form, **weight_figures(url, task, TASKS[task], template, rows, NAMES, fixed)}
            if benign:
                weights = in_order(NAMES, weigh(url, template, [row.prompt for row in benign], NAMES, fixed))
                line["benign"] = scores(url, TASKS[task], template, benign, weights, NAMES).mean
            show(line)
        if task in PARAPHRASED and PARAPHRASED_FORM in arguments.forms:
            rows = paraphrased(task, arguments.data)
            figures = weight_figures(url, task, PARAPHRASED[task], "chat", rows, NAMES, fixed)
            show({"task": task, "form": PARAPHRASED_FORM, **figures})


def nobody(url: str, files: Sequence[Path]) -> None:
    """Print a line for each file, and one for all together."""
    all_weights: list[Weights] = []
    for file in files:
        weights = in_order(NAMES, weigh(url, "chat", [row.prompt for row in read_rows(str(file), needs="prompt")], NAMES))
        all_weights += weights
        show(_nobody_line(file.name, weights))
    if files:
        show(_nobody_line("all", all_weights))


def _nobody_line(name: str, weights: Sequence[Weights]) -> dict[str, Any]:
    line: dict[str, Any] = {"nobody": name, "rows": len(weights)}
    line["any_above_half"] = statistics.fmean(max(each) > 0.5 for each in weights)
    line["all_above_half"] = statistics.fmean(sum(each) > 0.5 for each in weights)
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
    parser.add_argument(
        "--num-rows", type=int, default=0, help="rows of each file, drawn at random; 0 is all (paraphrased: always all)"
    )
    parser.add_argument("--tasks", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--nobody", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--fixed", type=_parse_weight, nargs="+", default=[], metavar="NAME=WEIGHT", help="given weights")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, metavar="FORM", help=f"of {', '.join(FORMS)}")
    arguments = parser.parse_args()
    nobody(arguments.url, arguments.nobody)
    compare(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
