"""Check that a request has the same answer, bit for bit, whatever runs beside it: on the embedded model with the demo adapters.

    python -m tests.bench.same_answers --data data [--num-requests 500]

Requests are drawn from the tasks' test rows: for the base, adapters and merges (sums and `ties`, several weights), as plain
prompts and as messages, greedy and seeded. Each runs alone on an engine in bf16; then all run in the ways of the table. A line
for each way: how many requests have other tokens or log-probabilities than alone, how many of them other tokens, how many tokens
of prompts were found in the prefix cache, and how many sequences were preempted. `LORI_MAX_CPU_ISA` limits the instruction set.
"""

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from lori.cli.output import print_table
from lori.embedded import embedded_model
from lori.merge_options import MergeOptions
from lori.native import description
from lori.template import Message
from server.engine.generate_request import GenerateRequest, Prompt, RefusedError
from server.engine.request import SamplingParams
from tests.server.rig import Rig, build
from training.demo.__main__ import rows_of

ADAPTERS = Path(__file__).parents[2] / "server" / "adapters"
NAMES = ("intent", "math", "nlu", "safety")
WEIGHTS = (0.5, 0.8, 1.0, -0.25)
MAX_TOKENS = (6, 24, 96, 96)
"""Lengths of answers. A sequence starts with a block of headroom, so only long answers lead to preemption."""
MAX_BATCH = 32
NUM_BLOCKS, NUM_TIGHT_BLOCKS = 8192, 40
"""Blocks of KV memory: for all prompts of 500 requests, and too few for 32 requests at once."""

Answer = tuple[list[int], list[float | None], list[dict[str, float]]]


@dataclass(frozen=True, slots=True)
class Run:
    """The answers of an engine to all requests."""

    answers: list[Answer]
    num_cached_tokens: int
    num_preemptions: int

    def row(self, way: str, alone: "Run") -> tuple[str, ...]:
        """Return the cells of the table."""
        pairs = list(zip(alone.answers, self.answers, strict=True))
        counts = (sum(a != b for a, b in pairs), sum(a[0] != b[0] for a, b in pairs))
        return way, *map(str, (*counts, self.num_cached_tokens, self.num_preemptions))


def main() -> int:
    """Run the benchmark and print the table. Return 1 if an answer differs, or little KV memory led to no preemption."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the tasks' rows")
    parser.add_argument("--num-requests", type=int, default=500)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    first = make_rig()
    requests = draw_requests(first, arguments.data, arguments.num_requests)
    alone = run(first, requests, 1)
    rows = [result.row(way, alone) for way, result in tqdm(run_ways(first, requests), total=NUM_WAYS, unit="way", disable=None)]
    print(f"{len(requests)} requests in bf16, {description()}")
    print_table(["way", "other answers", "other tokens", "cached tokens", "preempted"], rows)
    if not any(way == TIGHT and int(num_preemptions) for way, *_, num_preemptions in rows):
        print(f"{TIGHT}: no sequence was preempted, since these are too few requests or blocks too many", file=sys.stderr)
        return 1
    return int(any(count != "0" for _, count, *_ in rows))


NUM_WAYS = 7
TIGHT = "32 at once, with little KV memory"


def run_ways(first: Rig, requests: Sequence[GenerateRequest]) -> Iterator[tuple[str, Run]]:
    """Yield each way with its run. `first` has run `requests` already. Leaves torch with two threads."""
    yield "alone, from the prefix cache", run(first, requests, 1)
    yield "32 at once, from the prefix cache", run(first, requests)
    yield "32 at once", run(make_rig(), requests)
    yield "chunks of 16", run(make_rig(max_step_tokens=16 + MAX_BATCH), requests)
    yield TIGHT, run(make_rig(num_blocks=NUM_TIGHT_BLOCKS), requests)
    backwards = run(make_rig(), requests[::-1])
    yield "in another order", replace(backwards, answers=backwards.answers[::-1])
    torch.set_num_threads(2)
    yield "two threads", run(make_rig(), requests)


def make_rig(*, max_step_tokens: int = 512, num_blocks: int = NUM_BLOCKS) -> Rig:
    """Return an engine in bf16."""
    sizes = {"max_batch": MAX_BATCH, "max_step_tokens": max_step_tokens, "num_blocks": num_blocks, "num_slots": 200}
    return build(embedded_model(), ADAPTERS, dtype=torch.bfloat16, **sizes)


def run(rig: Rig, requests: Sequence[GenerateRequest], at_once: int | None = None) -> Run:
    """Run requests, `at_once` at a time, by default all."""
    size = at_once or len(requests)
    outputs = [output for start in range(0, len(requests), size) for output in rig.run(requests[start : start + size])]
    answers = [
        (output.tokens, [token.value for token in output.logprobs], [token.top for token in output.logprobs])
        for output in outputs
    ]
    return Run(answers, sum(output.done.num_cached_tokens for output in outputs), rig.scheduler.num_preemptions)


def draw_requests(rig: Rig, data: Path, count: int) -> list[GenerateRequest]:
    """Return `count` requests that the engine admits."""
    rng, requests = random.Random(3), list[GenerateRequest]()
    files = [data / name / "test.jsonl" for name in NAMES]
    prompts = [row["prompt"] for file in files for row in rows_of(file)]
    while len(requests) < count:
        adapters = tuple(rng.sample(NAMES, rng.choice([0, 1, 1, 2, 3])))
        request = GenerateRequest(
            prompt=draw_prompt(rng, rng.choice(prompts)),
            adapters=adapters,
            weights=tuple(rng.choice(WEIGHTS) for _ in adapters) or None,
            merge=MergeOptions("ties") if len(adapters) > 1 and rng.random() < 0.2 else MergeOptions(),
            max_tokens=rng.choice(MAX_TOKENS),
            sampling=SamplingParams(temperature=rng.choice([0.0, 1.0]), seed=len(requests), num_logprobs=2, ignore_eos=True),
        )
        with suppress(RefusedError):  # messages to adapters without a common template
            rig.admission.admit(request)
            requests.append(request)
    return requests


def draw_prompt(rng: random.Random, text: str) -> Prompt:
    """Return `text` as it is, as a message, or as a message after a system prompt."""
    message = Message(role="user", content=text)
    return rng.choice([text, text, [message], [Message(role="system", content="Be brief."), message]])


if __name__ == "__main__":
    sys.exit(main())
