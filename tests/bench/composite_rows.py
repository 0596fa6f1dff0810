"""Training rows of the adapters `upper`, `json` and `xml` of `tests.bench.composites`: the base's answers in these formats.

    python -m tests.bench.composite_rows --data data --output runs/formats [--url URL]

Prompts are everyday messages and benign requests: once as messages, once as plain prompts in frames. An answer is cut after its
first sentence; about half lose their last point, as labels have none. Prints the commands that train the adapters.
"""

import argparse
import random
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from lori.template import Template
from tests.bench.composites import FORMATS
from training.demo.__main__ import HERE, DemoConfig, Files, everyday, prompts_of, rows_of
from training.evaluation.answerer import Sampling
from training.evaluation.server_answerer import Server, ServerAnswerer

FRAMES = (
    "Question: {}\nAnswer:",
    "Q: {}\nA:",
    "User: {}\nReply:",
    "Input: {}\nOutput:",
    "Message: {}\nResponse:",
    "{}\n\nAnswer:",
)
NUM_PROMPTS, MAX_CHARACTERS = 1100, 160
OPTIONS = (
    *("--recipe", "training/recipes/parts/small.yaml", "--template", "plain", "--template", "chat", "--calibration-steps", "50"),
    *("--steps", "150", "--max-length", "192", "--held-out-fraction", "0.03"),
)


def first_sentence(text: str) -> str | None:
    """Return the first sentence of an answer, or a short first line; None if there is neither."""
    line = text.strip().split("\n")[0].strip()
    if sentence := re.match(r"(.{2,}?[.!?])(?:\s|$)", line):
        return sentence.group(1)
    return line if len(line) < 90 else None


def texts(url: str, prompts: list[str], drawn: random.Random) -> Iterator[tuple[str, str, Template]]:
    """Yield prompts with the base's short answers and their template."""
    framed = [FRAMES[i % len(FRAMES)].format(prompt) for i, prompt in enumerate(prompts)]
    templates: Mapping[Template, list[str]] = {"chat": prompts, "plain": framed}
    for template, sent in templates.items():
        answers = ServerAnswerer(Server(url), template=template).answers(sent, Sampling(40, temperature=0.7, seed=1))
        for prompt, answer in zip(sent, answers, strict=True):
            text = first_sentence(answer.text)
            if text and len(text) <= MAX_CHARACTERS:
                yield prompt, text.rstrip(".") if drawn.random() < 0.5 else text, template


def main() -> int:
    """Run the program and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the tasks' rows")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    arguments = parser.parse_args()
    files = Files(DemoConfig(data=arguments.data, output=arguments.output, url=arguments.url))
    benign = [row for row in files.task("safety") if not row.get("completion")]
    rows = [*rows_of(everyday(files)), *prompts_of(HERE / "lookalikes.txt"), *benign]
    prompts, drawn = list(dict.fromkeys(row["prompt"] for row in rows)), random.Random(0)
    drawn.shuffle(prompts)
    answered = [*texts(arguments.url, prompts[:NUM_PROMPTS], drawn)]
    for name, answer_format in FORMATS.items():
        made = [
            {"prompt": prompt, "completion": " " * (template == "plain") + answer_format.write(text), "template": template}
            for prompt, text, template in answered
        ]
        drawn.shuffle(made)
        file = files.make(f"{name}-rows", lambda made=made: made)
        words = ["python", "-m", "training.fit", *OPTIONS, "--data", str(file), "--output", str(arguments.output / name)]
        print(shlex.join(words))
    return 0


if __name__ == "__main__":
    sys.exit(main())
