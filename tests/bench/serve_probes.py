"""Probes: the effect of one request on others when a cold adapter is loaded or a long prompt arrives; and an open loop.

A probe is sent while other requests decode. It measures the largest gap between two tokens of any other request that overlaps
with the probe's own time, from its request to its first token.
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
"""Seconds within which all other requests must have produced a token."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of the requests, in words and tokens. Tests use smaller ones."""

    prompt_words: int = 100
    num_tokens: int = 64
    long_words: int = 4000
    others_tokens: int = 1000
    """Token limit of the other requests: more than they generate while they are watched. They are cancelled afterwards."""
    num_pairs: int = 8
    """Number of cold and of warm probes in a run."""
    num_arrivals: int = 96
    """Number of requests of an open loop."""
    settle_s: float = 0.3
    """Seconds between two probes: several steps of the other requests."""


def probe_cold(server: Server, warm: Sequence[str], cold: Iterator[str], sizes: Sizes, seed: str) -> dict[str, float]:
    """Return the additional latency in ms of the first request with an adapter, alone and beside 8 others, and of the others."""
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
    """Return the largest gap of other requests during a long prompt, relative to their usual gap, and the prompt's latency in ms.

    While the prompt is computed, for seconds, the contexts of the others grow, and so does their usual gap. It is interpolated
    linearly between the gap before the prompt and the gap after it.
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
    """Return the median time in s between two tokens of any of `others`, of tokens after `since`."""
    return statistics.median(late - early for other in others for early, late in pairwise(other.times) if early >= since)


def probe_open(server: Server, tokens_per_s: float, names: Sequence[str], sizes: Sizes, seed: str) -> Load:
    """Run an open loop of Poisson arrivals at a rate that needs `tokens_per_s`."""
    asks = make_asks(seed, sizes.num_arrivals, sizes.prompt_words, sizes.num_tokens, distinct(names))
    arrivals = poisson(tokens_per_s / sizes.num_tokens, len(asks), seed)
    return asyncio.run(open_loop(server.send, asks, arrivals))


@dataclass(frozen=True, slots=True)
class Probe:
    """One probe: its time to the first token, and the largest gap of other requests meanwhile (0 without others)."""

    first_ms: float
    gap_ms: float


async def probe(server: Server, ask: Ask, others: Sequence[Reply], settle_s: float) -> Probe:
    """Send `ask` while `others` decode. Waits until the others, too, have finished the step that answers it."""
    reply = await server.send(ask)
    await asyncio.sleep(settle_s)
    gaps = (largest_gap(other.times, reply.asked, reply.asked + reply.first_s) for other in others)
    return Probe(1e3 * reply.first_s, 1e3 * max(gaps, default=0.0))


def largest_gap(times: Sequence[float], start: float, end: float) -> float:
    """Return the largest time between two successive `times` that overlaps with `start` to `end`; 0 if none does."""
    pairs = pairwise(times)
    return max((after - before for before, after in pairs if before < end and after > start), default=0.0)


@asynccontextmanager
async def decoding(
    server: Server, count: int, choose: Callable[[int], Names], sizes: Sizes, seed: str
) -> AsyncIterator[Sequence[Reply]]:
    """Context manager of `count` requests that decode meanwhile. Yields their replies once all have decoded for a while."""
    asks = make_asks(f"{seed} others", count, sizes.prompt_words, sizes.others_tokens, choose)
    replies = [Reply() for _ in asks]
    tasks = [asyncio.create_task(server.send(*pair)) for pair in zip(asks, replies, strict=True)]
    try:
        await _all_begun(replies)
        # Gaps during the prefill of other prompts are not usual gaps.
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
    """Return the difference of a figure's median between cold and warm probes."""
    return statistics.median(figure(cold) for _, cold in pairs) - statistics.median(figure(warm) for warm, _ in pairs)
