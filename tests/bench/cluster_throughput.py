"""What servers generate in a second while users keep them busy: neither the first wave of requests nor the last is counted."""

import asyncio
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.bench.serve_asks import Choice, make_ask
from tests.bench.serve_load import Send, checked, no_collection, together
from tests.bench.serve_wire import Reply

PROMPT_WORDS, NUM_TOKENS = 100, 64


@dataclass(frozen=True, slots=True)
class Window:
    """What is counted: `seconds`, after `warm_s` in which the users' requests cease to be all of one age."""

    warm_s: float
    seconds: float


def tokens_per_s(sends: Sequence[Send], num_users: int, choose: Choice, seed: str, window: Window) -> float:
    """Returns the generated tokens/s of servers that have as many of the users each, who ask again when answered.

    The servers share the requests out in turn. An answer counts with the part of its time that lies in the window.
    Raises `FailedError`.
    """
    return asyncio.run(_run(sends, num_users, choose, seed, window))


async def _run(sends: Sequence[Send], num_users: int, choose: Choice, seed: str, window: Window) -> float:
    with no_collection():
        begin = time.perf_counter() + window.warm_s
        end = begin + window.seconds
        replies: list[tuple[float, Reply]] = []

        async def user(send: Send, numbers: Iterator[int]) -> None:
            while time.perf_counter() < end:
                ask = make_ask(seed, next(numbers), PROMPT_WORDS, NUM_TOKENS, choose)
                reply = checked(await send(ask), ask)
                replies.append((time.perf_counter(), reply))

        numbers = [itertools.count(place, len(sends)) for place in range(len(sends))]
        await together([user(sends[i % len(sends)], numbers[i % len(sends)]) for i in range(num_users)])
    return sum(counted(reply.asked, ended, begin, end) for ended, reply in replies) * NUM_TOKENS / window.seconds


def counted(asked: float, ended: float, begin: float, end: float) -> float:
    """Returns the share of the time from `asked` to `ended` that lies between `begin` and `end`."""
    return max(0.0, min(ended, end) - max(asked, begin)) / (ended - asked)
