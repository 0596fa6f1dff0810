"""How fast a replica is: tokens a second by how many requests run together, as told or as measured on a server that runs."""

import itertools
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from server.client import Client

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
        """Returns how long each of so many requests waits for a token: a line from one user to `users`, and beyond them no more
        tokens a second than theirs. What one user gets must be known."""
        assert self.single is not None
        if num_running >= self.users:
            return num_running / self.together
        first, last = 1 / self.single, self.users / self.together
        return first + (last - first) * (num_running - 1) / (self.users - 1)

    def at_most(self, num_running: int) -> float:
        """Returns the tokens a second where no more than so many run together. If that is fewer than `users`, what one user gets
        must be known."""
        return self.together if num_running >= self.users else num_running / self.seconds_per_token(num_running)

    def times(self, ratio: float) -> "Speed":
        """Returns the speed at `ratio` times the tokens a second."""
        return Speed(self.single and self.single * ratio, self.together * ratio, self.users)


def measure(url: str, *, users: int, prompt_tokens: int, completion_tokens: int, num_ids: int) -> Speed:
    """Returns the speed of the server at `url`, which should have nothing else to do; `num_ids` tokens are known there.

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
