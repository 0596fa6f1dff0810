"""Evaluation of automatic weights among ten adapters: `intent`, `math`, `safety`, and one for each of the seven sets of `nlu`.

    python -m tests.bench.ten_adapters --data data --output runs/ten        # writes training rows, prints commands
    python -m training.demo --data data --output runs/test --split test
    python -m server --adapters adapters --no-demo-adapters                 # the seven with `intent`, `math` and `safety`
    python -m tests.bench.ten_adapters --data data --chats runs/test [--num-rows 60]

A line for each adapter and form (`plain`, the test row as it is; `message`, the bare message) with the figures of
`tests.bench.auto_weights`; all ten are named. That of a set of `nlu` is the log-likelihood of the right answer, in nats a token.
Then the means, and the number of greedy answers that change when 32 requests run at once instead of one at a time: rows of all
adapters in one batch, each naming all ten.
"""

import argparse
import json
import random
import shlex
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lori.template import Template
from tests.bench.auto_weights import weight_figures
from tests.bench.demo import TASKS, forms_of, show
from training.demo.__main__ import bare, rows_of
from training.evaluation.metrics import MetricName, read_metric_rows
from training.evaluation.server_answerer import Ask, Server

SETS = ("arc-challenge", "arc-easy", "boolq", "openbookqa", "piqa", "social_i_qa", "winogrande")
NAMES = ("intent", "math", "safety", *SETS)
MAX_TRAINING_ROWS = 1600
OPTIONS = (
    *("--recipe", "training/recipes/parts/small.yaml", "--template", "plain", "--template", "chat", "--calibration-steps", "40"),
    *("--steps", "120", "--max-length", "192", "--held-out-fraction", "0.03"),
)
FORMS: Mapping[str, Template] = {"plain": "plain", "message": "chat"}
NUM_TOKENS = 24


def write(data: Path, output: Path) -> None:
    """Write training rows of each set, plain prompts and bare messages in turn, and print the commands that train on them."""
    by_set = defaultdict(list)
    for row in rows_of(data / "nlu" / "train.jsonl"):
        by_set[row["task"]].append(row)
    output.mkdir(parents=True, exist_ok=True)
    for name in SETS:
        rows = random.Random(0).sample(by_set[name], min(len(by_set[name]), MAX_TRAINING_ROWS))
        file = output / f"{name}.jsonl"
        lines = [json.dumps(as_message(row) if place % 2 else as_plain(row)) + "\n" for place, row in enumerate(rows)]
        file.write_text("".join(lines), encoding="utf-8")
        paths = ("--data", str(file), "--output", str(output / "adapters" / name))
        print(shlex.join(["python", "-m", "training.fit", *OPTIONS, *paths]))


def as_plain(row: Mapping[str, Any]) -> dict[str, str]:
    """Return a training row with the plain prompt of a row of `nlu`."""
    return {"prompt": row["prompt"], "completion": row["completion"], "template": "plain"}


def as_message(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a training row with the bare message of a row of `nlu`."""
    messages = [{"role": "user", "content": bare("nlu", row["prompt"])}]
    return {"prompt": messages, "completion": row["completion"].strip(), "template": "chat"}


def rows_for(name: str, form: str, arguments: argparse.Namespace) -> tuple[MetricName, list[Any]]:
    """Return the metric of an adapter, and test rows of one form; of `safety` the harmful ones."""
    task = "nlu" if name in SETS else name
    metric: MetricName = "loss" if name in SETS else TASKS[name]
    rows: list[Any] = read_metric_rows(str(forms_of(task, arguments.data, arguments.chats)[form][0]), metric)
    if name == "safety":
        rows = [row for row in rows if row.harmful]
    if name in SETS:
        rows = [row for row in rows if row.task == name]
    return metric, random.Random(0).sample(rows, min(len(rows), arguments.num_rows))


def compare_batches(arguments: argparse.Namespace) -> dict[str, int]:
    """Return how many greedy answers to rows of all adapters differ between one by one and 32 at once, all adapters named."""
    bodies = []
    for name in NAMES:
        for form, template in FORMS.items():
            for row in rows_for(name, form, arguments)[1][:8]:
                prompt = {"prompt": row.prompt} if template == "plain" else {"messages": [m.model_dump() for m in row.prompt]}
                bodies.append({**prompt, "adapter": NAMES, "max_tokens": NUM_TOKENS, "temperature": 0})
    random.Random(0).shuffle(bodies)

    async def ask_one(ask: Ask, body: Mapping[str, Any]) -> tuple[Any, ...]:
        reply = await ask("/generate", body)
        return reply["text"], reply["adapter"]

    alone, together = (Server(arguments.url, concurrency).ask_all(ask_one, bodies) for concurrency in (1, 32))
    return {"answers": len(bodies), "differ": sum(one != other for one, other in zip(alone, together, strict=True))}


def main() -> int:
    """Run the program and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, help="write training rows of the seven sets here, and measure nothing")
    parser.add_argument("--chats", type=Path, help="the folder of the test rows as messages")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--num-rows", type=int, default=60, help="rows of each adapter and form, drawn at random")
    parser.add_argument("--names", nargs="+", choices=NAMES, default=NAMES, help="the adapters whose rows are measured")
    arguments = parser.parse_args()
    if (arguments.output is None) == (arguments.chats is None):
        parser.error("give either --output or --chats")
    if arguments.output:
        write(arguments.data, arguments.output)
        return 0
    lines = []
    for form in FORMS:
        for name in arguments.names:
            metric, rows = rows_for(name, form, arguments)
            line = weight_figures(arguments.url, name, metric, FORMS[form], rows, NAMES)
            lines.append({"adapter": name, "form": form, **line})
            show(lines[-1])
    for form in FORMS:
        means = {
            key: statistics.fmean(line[key] for line in lines if line["form"] == form and line[key] is not None)
            for key in ("equal_kept", "auto_kept", "selected_kept", "found")
        }
        show({"mean_of_form": form, **means})
    show(compare_batches(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
