"""The speed of a replica: tokens a second by the number of concurrent requests, given or measured on a running server.

The constants are this project's own measurements, with their source; the planner has no other figures.
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
NNZ_PER_ROW = 3.2
"""Nonzero entries per row of B in the measurement: rank 32, density 10%."""
ROWS_OF_A = 32
"""Rows of A by which each token is multiplied in the measurement: one A of rank 32."""
TOKENS_PER_S, SINGLE_TOKENS_PER_S = 587.0, 121.0
"""Tokens a second of that model without adapters, with 32 users and with one."""
MEASURED = {
    "model": None, "dtype": "bfloat16", "quantization": None, "device": "cpu", "prompt_tokens": 100, "completion_tokens": 64,
    "users": 32,
}  # fmt: skip
"""Settings of the measurement, as `PlanConfig` names them."""
OVERHEAD_GIB = 0.9
"""Memory of a process on a CPU beside all that is counted: a server of the embedded model had 0.84 GiB more in RAM."""
RESERVED_FACTOR, HELD_FACTOR = 1.15, 1.35
"""Multiples of the adapters' bytes: the memory to reserve, and the memory that is then held when it is full.

The memory is laid out before it is known which modules keep more entries, and a part that is outgrown stays behind. Measured with
the demo adapters; at 1.0, it held 1.62."""
LOAD_S_PER_BYTE = 5.6e-3 / 1.34e6
"""Seconds to read, check, pack and place a byte of an adapter whose file is in the page cache: 5 and 0.6 ms for 1.34 MB."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """Tokens a second with adapters to those without, and the source of the figure."""

    value: float
    source: str


def _measured(value: float, case: str) -> Ratio:
    return Ratio(value, f"docs/benchmarks.md: {case}, 32 users, {MODEL}")


BY_ADAPTERS = {
    1: _measured(0.86, "1 adapter"),
    8: _measured(0.84, "8 adapters"),
    32: _measured(0.82, "32 adapters"),
    10_000: _measured(0.80, "zipf of 10,000 adapters"),
}
"""Ratios of requests for one adapter, by the most adapters there are. More than the last count as the last."""
BY_TERMS = {2: _measured(0.78, "32 merges of 2"), 4: _measured(0.72, "32 merges of 4")}
"""Ratios of merges, by the most adapters that a request names."""


def measured_ratio(num_adapters: int, num_terms: int, nnz_per_row: float, rows_of_a: int) -> Ratio | None:
    """Return the ratio of the nearest measured case that is no easier; `None` if there is none.

    `rows_of_a` are those of all A's together.
    """
    if nnz_per_row > NNZ_PER_ROW * (1 + 1e-9) or rows_of_a > ROWS_OF_A:
        return None
    if num_terms > 1:
        return next((ratio for most, ratio in BY_TERMS.items() if num_terms <= most), None)
    return next((ratio for most, ratio in BY_ADAPTERS.items() if num_adapters <= most), BY_ADAPTERS[10_000])


KEY_VARIABLE = "LORI_API_KEY"
NUM_ALONE, NUM_EACH = 4, 3
"""Requests of the single user, and of each of several users."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second generated for one user, if known, and for `users` together, with their prompts."""

    single: float | None
    together: float
    users: int

    def seconds_per_token(self, num_running: int) -> float:
        """Return the seconds that each of `num_running` requests waits for a token.

        Linear from one user to `users`; above that, the total rate stays that of `users`. The speed of one user must be known.
        """
        assert self.single is not None
        if num_running >= self.users:
            return num_running / self.together
        first, last = 1 / self.single, self.users / self.together
        return first + (last - first) * (num_running - 1) / (self.users - 1)

    def at_most(self, num_running: int) -> float:
        """Return the tokens a second with at most `num_running` requests together.

        If that is fewer than `users`, the speed of one user must be known.
        """
        return self.together if num_running >= self.users else num_running / self.seconds_per_token(num_running)

    def times(self, ratio: float) -> "Speed":
        """Return the speed at `ratio` times the tokens a second."""
        return Speed(self.single and self.single * ratio, self.together * ratio, self.users)


def measure(url: str, *, users: int, prompt_tokens: int, completion_tokens: int, num_ids: int) -> Speed:
    """Return the speed of the server at `url`, which should be idle. `num_ids` is the size of its vocabulary.

    Every prompt is different, and names no adapter. Raises `server.client.ClientError`.
    """
    seeds = itertools.count()
    with Client(url, api_key=os.environ.get(KEY_VARIABLE), num_retries=0) as client:

        def ask(_: int) -> int:
            prompt = [*itertools.islice(_ids(next(seeds), num_ids), prompt_tokens)]
            reply = client.generate(prompt=prompt, max_tokens=completion_tokens, ignore_eos=True)
            return reply.usage.completion_tokens

        def rate(num_users: int, num_requests: int) -> float:
            with ThreadPoolExecutor(num_users) as pool:
                started = time.perf_counter()
                num_tokens = sum(pool.map(ask, range(num_requests)))
                return num_tokens / (time.perf_counter() - started)

        rate(1, 1)  # a warm-up
        return Speed(rate(1, NUM_ALONE), rate(users, NUM_EACH * users), users)


def _ids(seed: int, num_ids: int) -> Iterator[int]:
    draw = random.Random(seed)
    return (draw.randrange(num_ids) for _ in itertools.count())
