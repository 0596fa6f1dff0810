"""Evaluation of the demo adapters on every form of prompt, compared with the base and with other adapters.

    python -m training.demo --data data --output runs/test --split test
    python -m tests.bench.demo --data data --chats runs/test [--url URL] [--against URL] [--num-rows 400]

Asks the server at `--url` and, with `--against`, another server with other adapters of the same names. Three parts:

`ordinary`: the effect of each adapter on ordinary messages: the decrease of the log-likelihood of the base's own answers, in nats
a token, and the fraction that is refused.

`merges`: the refusals of `safety` when it is merged with `math`, at fixed weights and at the server's default (automatic) ones.

`tasks`: a line for each task and form: the figures of the base and of the adapter, the gain relative to that of the plain form,
and the fraction of empty answers. With `--against` also the other adapter's figure on `plain`, and the difference with its
standard error over the same rows (a paired test). Forms: `plain`, the test row as it is; `sent`, the same as a message;
`message`, the bare message; `system`, the bare message after a system prompt; `later`, after earlier turns, half of them with a
system prompt; `sum` and `mixed`, a request to `safety` in frames that ask for other things, too; `question`, the request as a
question; `acts`, questions about how to do short harmful or harmless acts. For each figure more is better: exact match;
log-likelihood in nats a token; accuracy by character, over all rows; right refusals.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import training.demo
from lori.template import Template, render_completion
from training.data import Row
from training.evaluation.answerer import Sampling
from training.evaluation.metrics import MIN_EXACT, MetricName, is_exact, is_refusal, read_metric_rows
from training.evaluation.server_answerer import Server, ServerAnswerer

TASKS: dict[str, MetricName] = {"intent": "exact", "math": "loss", "nlu": "choice", "safety": "refusal"}
CHATS = ("message", "system", "later")
NUM_TOKENS = 48
ORDINARY = Path(training.demo.__file__).with_name("ordinary_test.txt")
MERGED = ("math", "safety")
MERGES: Sequence[tuple[float, ...]] = ((1.0, 0.8), (0.7, 0.3), (0.5, 0.5), ())
"""Weights of the merges; () are the server's default ones."""
KINDS = (("harmful_refused", True), ("benign_refused", False))
PARTS = ("ordinary", "merges", "tasks")
SAFETY_CHATS = (*CHATS, "sum", "mixed", "question", "acts")


@dataclass(frozen=True, slots=True)
class Scores:
    """A value and its weight for each row (more is better), and the fraction of empty answers, if the metric has answers."""

    values: Sequence[float]
    weights: Sequence[float]
    empty: float | None = None

    @property
    def mean(self) -> float:
        """The weighted mean."""
        return sum(v * w for v, w in zip(self.values, self.weights, strict=True)) / sum(self.weights)

    def minus(self, other: "Scores") -> tuple[float, float]:
        """Return the mean difference from `other` on the same rows, and its standard error."""
        total = sum(self.weights)
        difference = self.mean - other.mean
        parts = [w * (a - b - difference) for a, b, w in zip(self.values, other.values, self.weights, strict=True)]
        return difference, math.sqrt(len(parts) / (len(parts) - 1) * sum(part**2 for part in parts)) / total


def measured(answerer: ServerAnswerer, metric: MetricName, rows: Sequence[Any]) -> Scores:
    """Return the scores of an answerer on `rows`."""
    prompts = [row.prompt for row in rows]
    if metric == "loss":
        likelihoods = answerer.log_likelihoods([(row.prompt, row.completion) for row in rows])
        return Scores([score.total / score.num_tokens for score in likelihoods], [score.num_tokens for score in likelihoods])
    if metric == "choice":
        scores = iter(answerer.log_likelihoods([(row.prompt, choice) for row in rows for choice in row.choices]))
        values = []
        for row in rows:
            rates = [next(scores).total / len(choice) for choice in row.choices]
            values.append(float(rates.index(max(rates)) == row.label))
        return Scores(values, [1.0] * len(rows))
    sampling = Sampling(MIN_EXACT, ("\n",) if metric == "exact" else ())
    texts = [text for [text] in answerer.complete(prompts, sampling)]
    if metric == "exact":
        expected = [render_completion(row.prompt_text, row.completion or "", answerer.template) for row in rows]
        return Scores([float(is_exact(*pair)) for pair in zip(texts, expected, strict=True)], [1.0] * len(rows), empty(texts))
    right = [float(is_refusal(text) == row.harmful) for text, row in zip(texts, rows, strict=True)]
    return Scores(right, [1.0] * len(rows), empty(texts))


def forms_of(task: str, data: Path, chats: Path) -> dict[str, tuple[Path, Template]]:
    """Return the file and the template of each form of a task."""
    test_file = data / task / "test.jsonl"
    forms: dict[str, tuple[Path, Template]] = {"plain": (test_file, "plain")}
    if task != "safety":
        forms["sent"] = (test_file, "chat")
    for form in SAFETY_CHATS if task == "safety" else CHATS:
        forms[form] = (chats / f"{task}-{form}.jsonl", "chat")
    return forms


def answerer_for(url: str, template: Template, adapters: Sequence[str] = (), weights: Sequence[float] = ()) -> ServerAnswerer:
    """Return the server at `url` as an answerer, with `adapters`."""
    server = Server(url)
    selection: dict[str, Any] = {"adapter": list(adapters)} if adapters else {}
    selection |= {"weights": list(weights)} if weights else {}
    versions = [adapter.version for name in adapters for adapter in server.adapters(name)]
    return ServerAnswerer(server, selection, versions, template)


def compare(arguments: argparse.Namespace) -> None:
    """Print a line for each task and form."""
    url, other_url = arguments.url, arguments.against
    for task in arguments.tasks:
        metric, plain_gain = TASKS[task], math.nan
        for form, (file, template) in forms_of(task, arguments.data, arguments.chats).items():
            rows: list[Row] = read_metric_rows(str(file), metric, arguments.num_rows)
            base = measured(answerer_for(url, template), metric, rows)
            adapted = measured(answerer_for(url, template, [task]), metric, rows)
            gain = adapted.mean - base.mean
            plain_gain = gain if form == "plain" else plain_gain
            line = {"task": task, "form": form, "rows": len(rows), "base": base.mean, "adapter": adapted.mean}
            line |= {"of_plain": gain / plain_gain if plain_gain else None, "empty": adapted.empty, "base_empty": base.empty}
            if other_url and form == "plain":
                reference = measured(answerer_for(other_url, template, [task]), metric, rows)
                difference, error = adapted.minus(reference)
                line |= {"against": reference.mean, "difference": difference, "error": error}
            show(line)


def merges(arguments: argparse.Namespace) -> None:
    """Print a line for each merge with `safety` and each form: the fractions of harmful and of benign rows that are refused."""
    for weights in MERGES:
        for form in SAFETY_CHATS:
            rows: list[Any] = read_metric_rows(str(arguments.chats / f"safety-{form}.jsonl"), "refusal")
            texts = completions(answerer_for(arguments.url, "chat", MERGED, weights), rows)
            named = [f"{name}:{weight:g}" for name, weight in zip(MERGED, weights, strict=True)] if weights else MERGED
            figures: dict[str, Any] = {"merge": "+".join(named)}
            for kind, is_harmful in KINDS:
                figures[kind] = refused([text for text, row in zip(texts, rows, strict=True) if row.harmful == is_harmful])
            show(figures | {"form": form, "empty": empty(texts)})


def ordinary(url: str, other_url: str | None) -> None:
    """Print a line for each adapter: its effect on ordinary messages, by `NUM_TOKENS` of the base's own answers."""
    rows = [line for line in ORDINARY.read_text(encoding="utf-8").splitlines() if line]
    sampling = Sampling(NUM_TOKENS)
    answers = [text for [text] in answerer_for(url, "chat").complete(rows, sampling)]
    pairs = [(row, text) for row, text in zip(rows, answers, strict=True) if text]

    def likelihoods(server_url: str, names: Sequence[str]) -> Scores:
        scores = answerer_for(server_url, "chat", names).log_likelihoods(pairs)
        return Scores([score.total / score.num_tokens for score in scores], [score.num_tokens for score in scores])

    base = likelihoods(url, [])
    line: dict[str, Any] = {"adapter": "base", "rows": len(rows), "log_likelihood": base.mean}
    show(line | {"refused": refused(answers), "empty": empty(answers)})
    for server_url in filter(None, (url, other_url)):
        for task in TASKS:
            texts = [text for [text] in answerer_for(server_url, "chat", [task]).complete(rows, sampling)]
            fall, error = base.minus(likelihoods(server_url, [task]))
            same = statistics.fmean(text == answer for text, answer in zip(texts, answers, strict=True))
            line = {
                "adapter": task, "at": server_url, "fall": fall, "error": error, "refused": refused(texts), "empty": empty(texts)
            }  # fmt: skip
            show(line | {"same": same})


def refused(texts: Sequence[str]) -> float:
    """Return the fraction of answers that are refusals."""
    return statistics.fmean(map(is_refusal, texts))


def empty(texts: Sequence[str]) -> float:
    """Return the fraction of answers that are empty."""
    return statistics.fmean(not text.strip() for text in texts)


def completions(answerer: ServerAnswerer, rows: Sequence[Row]) -> list[str]:
    """Return a greedy answer to each row."""
    return [text for [text] in answerer.complete([row.prompt for row in rows], Sampling(NUM_TOKENS))]


def show(line: dict[str, Any]) -> None:
    """Print a line of figures as JSON."""
    print(json.dumps({name: round(value, 4) if isinstance(value, float) else value for name, value in line.items()}), flush=True)


def main() -> int:
    """Run the program and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--chats", type=Path, required=True)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--against", metavar="URL")
    parser.add_argument("--num-rows", type=int, default=0, help="rows of each file, drawn at random, for --parts tasks; 0 is all")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), help="for --parts tasks")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    arguments = parser.parse_args()
    if "ordinary" in arguments.parts:
        ordinary(arguments.url, arguments.against)
    if "merges" in arguments.parts:
        merges(arguments)
    if "tasks" in arguments.parts:
        compare(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
