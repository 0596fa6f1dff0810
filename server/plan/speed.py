"""The speed of a replica: tokens a second by the number of concurrent requests, given or measured on a running server.

The constants are this project's own measurements, with their source; the planner knows no other numbers.
"""

import itertools
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from server.client import Client

MODEL = "SmolLM2-135M in bfloat16 on one core of an AMD EPYC with AVX-512"
KEPT_A_ROW = 3.2
"""Entries that a row of B keeps in what was measured: rank 32, a tenth."""
ROWS_OF_A = 32
"""That a token is multiplied by there: one A of rank 32."""
TOKENS_PER_S, SINGLE_TOKENS_PER_S = 587.0, 121.0
"""Of that model without adapters, with 32 users and with one."""
MEASURED = {
    "model": None, "dtype": "bfloat16", "quantization": None, "device": "cpu", "prompt_tokens": 100, "completion_tokens": 64,
    "users": 32,
}  # fmt: skip
"""What they are of, as `PlanConfig` has it."""
OVERHEAD_GIB = 0.9
"""Of a process on a CPU, beside all that is counted: a server of the embedded model had 0.84 more in RAM than is."""
RESERVED, HELD = 1.15, 1.35
"""Times the adapters' bytes: what their memory should be told to have, and what it then holds when it is full, for its parts are
laid out before it is known which modules keep more, and what outgrows its part leaves that behind. Measured with the demo
adapters; told 1.0, it held 1.62."""
LOAD_S_PER_BYTE = 5.6e-3 / 1.34e6
"""Of reading, checking, packing and placing an adapter whose file the system has in memory: 5 and 0.6 ms of 1.34 MB."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """Tokens a second with adapters to those without, and where it is from."""

    value: float
    source: str


def _of(value: float, case: str) -> Ratio:
    return Ratio(value, f"README, How fast: {case}, 32 users, {MODEL}")


BY_ADAPTERS = {
    1: _of(0.86, "1 adapter"),
    8: _of(0.84, "8 adapters"),
    32: _of(0.82, "32 adapters"),
    10_000: _of(0.80, "zipf of 10,000 adapters"),
}
"""Of requests for one adapter, by how many adapters there are at most; more than the last are taken for as many."""
BY_TERMS = {2: _of(0.78, "32 merges of 2"), 4: _of(0.72, "32 merges of 4")}
"""Of merges, by how many adapters a request names at most."""


def measured_ratio(num_adapters: int, num_terms: int, kept_a_row: float, rows_of_a: int) -> Ratio | None:
    """Return the ratio of the measured case that is nearest and no easier; `None` where none was.

    `rows_of_a` are those of all A's together.
    """
    if kept_a_row > KEPT_A_ROW * (1 + 1e-9) or rows_of_a > ROWS_OF_A:
        return None
    if num_terms > 1:
        return next((of for most, of in BY_TERMS.items() if num_terms <= most), None)
    return next((of for most, of in BY_ADAPTERS.items() if num_adapters <= most), BY_ADAPTERS[10_000])


KEY_VARIABLE = "LORI_API_KEY"
NUM_ALONE, NUM_TURNS = 4, 3
"""Requests of the user who is alone, and of each of the many."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second that are generated for one user, where it is known, and for `users`, prompts and all."""

    single: float | None
    together: float
    users: int

    def seconds_per_token(self, num_running: int) -> float:
        """Return how long each of so many requests waits for a token: a line from one user to `users`, and beyond them no more
        tokens a second than theirs. What one user gets must be known."""
        assert self.single is not None
        if num_running >= self.users:
            return num_running / self.together
        first, last = 1 / self.single, self.users / self.together
        return first + (last - first) * (num_running - 1) / (self.users - 1)

    def at_most(self, num_running: int) -> float:
        """Return the tokens a second where no more than so many run together. If that is fewer than `users`, what one user gets
        must be known."""
        return self.together if num_running >= self.users else num_running / self.seconds_per_token(num_running)

    def times(self, ratio: float) -> "Speed":
        """Return the speed at `ratio` times the tokens a second."""
        return Speed(self.single and self.single * ratio, self.together * ratio, self.users)


def measure(url: str, *, users: int, prompt_tokens: int, completion_tokens: int, num_ids: int) -> Speed:
    """Return the speed of the server at `url`, which should have nothing else to do; `num_ids` tokens are known there.

    Every prompt is another one, and names no adapter. Raises `server.client.ClientError`.
    """
    asked = itertools.count()
    with Client(url, api_key=os.environ.get(KEY_VARIABLE), num_retries=0) as client:

        def ask(_: int) -> int:
            prompt = [*itertools.islice(_ids(next(asked), num_ids), prompt_tokens)]
            reply = client.generate(prompt=prompt, max_tokens=completion_tokens, ignore_eos=True)
            return reply.usage.completion_tokens

        def rate(num_users: int, num_requests: int) -> float:
            with ThreadPoolExecutor(num_users) as pool:
                started = time.perf_counter()
                num_tokens = sum(pool.map(ask, range(num_requests)))
                return num_tokens / (time.perf_counter() - started)

        rate(1, 1)  # the first of all
        return Speed(rate(1, NUM_ALONE), rate(users, NUM_TURNS * users), users)


def _ids(seed: int, num_ids: int) -> Iterator[int]:
    draw = random.Random(seed)
    return (draw.randrange(num_ids) for _ in itertools.count())
