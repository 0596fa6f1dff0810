"""What one request does to others: a cold adapter that is loaded, a long prompt that arrives, and arrivals as they come.

A probe is sent while others decode. What counts is the largest time between two tokens of any of them that meets the probe's own
time, from its request to its first token.
"""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise

from tests.bench.serve_asks import Ask, Names, distinct, make_asks, no_adapter, poisson, prompt
from tests.bench.serve_load import Load, no_collection, open_loop
from tests.bench.serve_targets import Server
from tests.bench.serve_wire import FailedError, Reply

BEGIN_S = 60
"""In which all others must have begun, prompts and all."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much a request is, in words and tokens; smaller in tests."""

    prompt_words: int = 100
    num_tokens: int = 64
    long_words: int = 4000
    others_tokens: int = 1000
    """What others can generate while they are watched, more than they will; they are left when that is over."""
    num_pairs: int = 8
    """Cold and warm probes of a run."""
    num_arrivals: int = 96
    """Requests of an open loop."""
    settle_s: float = 0.3
    """Between two probes: several steps of the others."""


def probe_cold(server: Server, warm: Sequence[str], cold: Iterator[str], sizes: Sizes, seed: str) -> dict[str, float]:
    """Returns, in ms, what a first request on an adapter waits more than a second, alone and beside 8, and what these wait."""
    return asyncio.run(_cold(server, warm, cold, sizes, seed))


async def _cold(server: Server, warm: Sequence[str], cold: Iterator[str], sizes: Sizes, seed: str) -> dict[str, float]:
    choose = distinct(warm)
    with no_collection():
        alone = await _pairs(server, [], choose, cold, sizes, f"{seed} alone")
        async with decoding(server, 8, choose, sizes, seed) as others:
            beside = await _pairs(server, others, choose, cold, sizes, f"{seed} beside")
    return {
        "cold adapter, alone: more to the first token, ms": _more(alone, lambda probe: probe.first_ms),
        "cold adapter, beside 8: more to the first token, ms": _more(beside, lambda probe: probe.first_ms),
        "cold adapter, beside 8: their largest gap grows by, ms": _more(beside, lambda probe: probe.gap_ms),
    }


def probe_long(server: Server, num_others: int, names: Sequence[str], sizes: Sizes, seed: str) -> dict[str, float]:
    """Returns what a long prompt makes others wait, as a ratio to their usual step, and how long it itself waits, in ms.

    While it is computed for seconds the others' own contexts grow, and so does their usual step: it is taken to grow evenly from
    what it was before to what it is after.
    """
    return asyncio.run(_long(server, num_others, names, sizes, seed))


async def _long(server: Server, num_others: int, names: Sequence[str], sizes: Sizes, seed: str) -> dict[str, float]:
    with no_collection():
        async with decoding(server, num_others, distinct(names) if names else no_adapter, sizes, seed) as others:
            before = usual_gap(others, 0.0)
            reply = await server.send(Ask(prompt(f"{seed} long", sizes.long_words), (), 1))
            answered_at = time.perf_counter()
            await asyncio.sleep(4 * sizes.settle_s)
            after = usual_gap(others, answered_at)
    end = reply.asked + reply.first_s
    ratios = (
        (late - early) / (before + (after - before) * min(1.0, max(0.0, (late - reply.asked) / reply.first_s)))
        for other in others
        for early, late in pairwise(other.times)
        if early < end and late > reply.asked
    )
    return {
        f"long prompt, beside {num_others}: their largest gap / usual": max(ratios),
        f"long prompt, beside {num_others}: its first token, ms": 1e3 * reply.first_s,
    }


def usual_gap(others: Sequence[Reply], since: float) -> float:
    """Returns the median time between two tokens of any of `others`, both since then, in s."""
    return statistics.median(late - early for other in others for early, late in pairwise(other.times) if early >= since)


def probe_open(server: Server, tokens_per_s: float, names: Sequence[str], sizes: Sizes, seed: str) -> Load:
    """Runs Poisson arrivals that want so many tokens/s."""
    asks = make_asks(seed, sizes.num_arrivals, sizes.prompt_words, sizes.num_tokens, distinct(names))
    arrivals = poisson(tokens_per_s / sizes.num_tokens, len(asks), seed)
    return asyncio.run(open_loop(server.send, asks, arrivals))


@dataclass(frozen=True, slots=True)
class Probe:
    """One probe: its time to the first token, and the others' largest gap meanwhile; 0 where there are none."""

    first_ms: float
    gap_ms: float


async def probe(server: Server, ask: Ask, others: Sequence[Reply], settle_s: float) -> Probe:
    """Sends `ask` while `others` decode, and lets the step that answers it end for them too."""
    reply = await server.send(ask)
    await asyncio.sleep(settle_s)
    gaps = (largest_gap(other.times, reply.asked, reply.asked + reply.first_s) for other in others)
    return Probe(1e3 * reply.first_s, 1e3 * max(gaps, default=0.0))


def largest_gap(times: Sequence[float], start: float, end: float) -> float:
    """Returns the largest time between two of `times` that meets `start` to `end`; 0 where none does."""
    pairs = pairwise(times)
    return max((after - before for before, after in pairs if before < end and after > start), default=0.0)


@asynccontextmanager
async def decoding(
    server: Server, count: int, choose: Callable[[int], Names], sizes: Sizes, seed: str
) -> AsyncIterator[Sequence[Reply]]:
    """Yields so many answers that come while the block runs, when they have come for a while."""
    asks = make_asks(f"{seed} others", count, sizes.prompt_words, sizes.others_tokens, choose)
    replies = [Reply() for _ in asks]
    tasks = [asyncio.create_task(server.send(*pair)) for pair in zip(asks, replies, strict=True)]
    try:
        await _all_begun(replies)
        # What came while some prompts were computed is no usual step.
        for reply in replies:
            reply.times.clear()
        await asyncio.sleep(4 * sizes.settle_s)
        _check_running(tasks)
        yield replies
        _check_running(tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _check_running(tasks: Sequence[asyncio.Task[Reply]]) -> None:
    if any(task.done() for task in tasks):
        raise FailedError("others ended while they were watched: their tokens are too few")


async def _all_begun(replies: Sequence[Reply]) -> None:
    for _ in range(round(BEGIN_S / 0.02)):
        if all(reply.times for reply in replies):
            return
        await asyncio.sleep(0.02)
    num_begun = sum(bool(reply.times) for reply in replies)
    raise FailedError(f"of {len(replies)} requests that are to decode together, {num_begun} do after {BEGIN_S} s")


async def _pairs(
    server: Server, others: Sequence[Reply], choose: Callable[[int], Names], cold: Iterator[str], sizes: Sizes, seed: str
) -> list[tuple[Probe, Probe]]:
    pairs = []
    for i in range(sizes.num_pairs):
        asks = [Ask(prompt(f"{seed} {i} {name}", sizes.prompt_words), name, 1) for name in (choose(i), (next(cold),))]
        first, second = (0, 1) if i % 2 else (1, 0)
        probes = {index: await probe(server, asks[index], others, sizes.settle_s) for index in (first, second)}
        pairs.append((probes[0], probes[1]))
    return pairs


def _more(pairs: Sequence[tuple[Probe, Probe]], figure: Callable[[Probe], float]) -> float:
    """Returns how much larger a figure is where the adapter was cold, in the middle of all probes."""
    return statistics.median(figure(cold) for _, cold in pairs) - statistics.median(figure(warm) for warm, _ in pairs)
