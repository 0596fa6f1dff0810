"""Throughput of servers in a closed loop of users. Neither the first wave of requests nor the last is counted."""

import asyncio
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil

from tests.bench.serve_asks import Choice, make_ask
from tests.bench.serve_load import Send, checked, no_collection, together
from tests.bench.serve_wire import Reply

PROMPT_WORDS, NUM_TOKENS = 100, 64


@dataclass(frozen=True, slots=True)
class Window:
    """The measured time: `seconds`, after `warm_s` in which the users' requests get out of step."""

    warm_s: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Throughput:
    """Generated tokens/s, and the number of cores busy in this process (the users) and in its child processes (the servers)."""

    tokens_per_s: float
    cores: float


def throughput(sends: Sequence[Send], num_users: int, choose: Choice, seed: str, window: Window) -> Throughput:
    """Return the throughput of servers in a closed loop of `num_users`, who are divided evenly among `sends`.

    The requests are divided among the servers in turn. An answer counts with the fraction of its time that lies in the window.
    Raises `FailedError`.
    """
    return asyncio.run(_run(sends, num_users, choose, seed, window))


async def _run(sends: Sequence[Send], num_users: int, choose: Choice, seed: str, window: Window) -> Throughput:
    with no_collection():
        begin = time.perf_counter() + window.warm_s
        end = begin + window.seconds
        replies: list[tuple[float, Reply]] = []
        cpu_s: list[float] = []

        async def user(send: Send, numbers: Iterator[int]) -> None:
            while time.perf_counter() < end:
                ask = make_ask(seed, next(numbers), PROMPT_WORDS, NUM_TOKENS, choose)
                reply = checked(await send(ask), ask)
                replies.append((time.perf_counter(), reply))

        async def watch() -> None:
            for moment in (begin, end):
                await asyncio.sleep(moment - time.perf_counter())
                cpu_s.append(_cpu_s())

        numbers = [itertools.count(index, len(sends)) for index in range(len(sends))]
        await together([watch(), *(user(sends[i % len(sends)], numbers[i % len(sends)]) for i in range(num_users))])
    tokens = sum(counted(reply.asked, ended, begin, end) for ended, reply in replies) * NUM_TOKENS
    return Throughput(tokens / window.seconds, (cpu_s[1] - cpu_s[0]) / window.seconds)


def counted(asked: float, ended: float, begin: float, end: float) -> float:
    """Return the fraction of the time from `asked` to `ended` that lies between `begin` and `end`."""
    return max(0.0, min(ended, end) - max(asked, begin)) / (ended - asked)


def _cpu_s() -> float:
    this, total = psutil.Process(), 0.0
    for process in (this, *this.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total
