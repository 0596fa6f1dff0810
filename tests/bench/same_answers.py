"""Whether a request has the same answer, bit for bit, whatever runs beside it: on the embedded model with the demo adapters.

    python -m tests.bench.same_answers --data data [--num-requests 500]

Requests are drawn from the tasks' test rows: for the base, adapters and merges (sums and `ties`, several weights), as plain
prompts and as messages, greedy and seeded. Each runs alone on an engine in bf16; then all run in the ways of the table. A line
for each way: how many requests have other tokens or log-probabilities than alone, and how many of them other tokens.
`LORI_MAX_CPU_ISA` limits the instruction set.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from lori.cli.output import print_table
from lori.embedded import embedded_model
from lori.kernels.native import description
from lori.merge_options import MergeOptions
from lori.template import Message
from server.engine.admission import GenerateRequest, Prompt, RefusedError
from server.engine.request import SamplingParams
from tests.server.rig import Rig, build

ADAPTERS = Path(__file__).parents[2] / "server" / "adapters"
NAMES = ("intent", "math", "nlu", "safety")
WEIGHTS = (0.5, 0.8, 1.0, -0.25)
MAX_TOKENS = 24
MOST = 32
"""Requests at once."""
TIGHT = 144
"""Blocks of KV memory that are too few for 32 requests, so that some are preempted."""

Answer = tuple[list[int], list[float | None], list[dict[str, float]]]


def main() -> int:
    """Run the benchmark and print the table. Return 1 if an answer differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the tasks' rows")
    parser.add_argument("--num-requests", type=int, default=500)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    first = make_rig()
    requests = draw_requests(first, arguments.data, arguments.num_requests)
    alone = answers(first, requests, 1)
    rows = []
    for way, run in tqdm(ways(first, requests).items(), unit="way", disable=None):
        torch.set_num_threads(2 if way == "two threads" else 1)
        rows.append((way, *map(str, differing(alone, run()))))
    print(f"{len(requests)} requests in bf16, {description()}")
    print_table(["way", "other answers", "other tokens"], rows)
    return int(any(count != "0" for _, count, _ in rows))


def make_rig(*, max_step_tokens: int = 512, num_blocks: int = 4096) -> Rig:
    """Return an engine in bf16."""
    sizes = {"max_batch": MOST, "max_step_tokens": max_step_tokens, "num_blocks": num_blocks, "num_slots": 200}
    return build(embedded_model(), ADAPTERS, dtype=torch.bfloat16, **sizes)


def ways(first: Rig, requests: Sequence[GenerateRequest]) -> dict[str, Callable[[], list[Answer]]]:
    """Return the ways to run `requests`. `first` has run them already."""
    return {
        "alone, from the prefix cache": lambda: answers(first, requests, 1),
        "32 at once, from the prefix cache": lambda: answers(first, requests),
        "32 at once": lambda: answers(make_rig(), requests),
        "chunks of 16": lambda: answers(make_rig(max_step_tokens=16 + MOST), requests),
        "preempted": lambda: preempted(make_rig(num_blocks=TIGHT), requests),
        "in another order": lambda: answers(make_rig(), requests[::-1])[::-1],
        "two threads": lambda: answers(make_rig(), requests),
    }


def draw_requests(rig: Rig, data: Path, count: int) -> list[GenerateRequest]:
    """Return `count` requests that the engine admits."""
    rng, requests = random.Random(3), list[GenerateRequest]()
    files = [data / name / "test.jsonl" for name in NAMES]
    prompts = [json.loads(line)["prompt"] for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    while len(requests) < count:
        adapters = tuple(rng.sample(NAMES, rng.choice([0, 1, 1, 2, 3])))
        request = GenerateRequest(
            prompt=in_some_form(rng, rng.choice(prompts)),
            adapters=adapters,
            weights=tuple(rng.choice(WEIGHTS) for _ in adapters) or None,
            merge=MergeOptions("ties") if len(adapters) > 1 and rng.random() < 0.2 else MergeOptions(),
            max_tokens=rng.randint(4, MAX_TOKENS),
            sampling=SamplingParams(temperature=rng.choice([0.0, 1.0]), seed=len(requests), num_logprobs=2, ignore_eos=True),
        )
        with suppress(RefusedError):  # messages to adapters without a common template
            rig.admission.admit(request)
            requests.append(request)
    return requests


def in_some_form(rng: random.Random, text: str) -> Prompt:
    """Return `text` as it is, as a message, or as a message after a system prompt."""
    message = Message(role="user", content=text)
    return rng.choice([text, text, [message], [Message(role="system", content="Be brief."), message]])


def answers(rig: Rig, requests: Sequence[GenerateRequest], at_once: int = 10**6) -> list[Answer]:
    """Run requests, `at_once` at a time. Return their tokens and log-probabilities."""
    heard = [one for start in range(0, len(requests), at_once) for one in rig.run(requests[start : start + at_once])]
    return [(one.tokens, [token.value for token in one.logprobs], [token.top for token in one.logprobs]) for one in heard]


def preempted(rig: Rig, requests: Sequence[GenerateRequest]) -> list[Answer]:
    """Run requests on an engine whose memory is too small for them. Ends the program if none was preempted."""
    found = answers(rig, requests)
    if not rig.scheduler.num_preemptions:
        sys.exit("error: no request was preempted, so nothing is shown")
    return found


def differing(alone: Sequence[Answer], found: Sequence[Answer]) -> tuple[int, int]:
    """Return how many answers differ, and how many of these in their tokens."""
    pairs = list(zip(alone, found, strict=True))
    return sum(a != b for a, b in pairs), sum(a[0] != b[0] for a, b in pairs)


if __name__ == "__main__":
    sys.exit(main())
