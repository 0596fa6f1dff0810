"""Latency that a cluster adds to a request, compared with a plain server; one request at a time, alternately to both."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import httpx

from tests.bench.serve_asks import prompt

NUM_REQUESTS, NUM_WARM = 100, 10
NUM_TOKENS, PROMPT_WORDS = 8, 20
Ask = Callable[[httpx.Client, dict[str, object]], None]


def overheads(plain_port: int, cluster_port: int, names: Sequence[str], seed: str) -> Mapping[str, Mapping[str, float]]:
    """Return, by kind of request, the median latency of a plain server and the additional latency of a cluster, in ms."""
    kinds = {"GET /health": health, "POST /generate, whole": whole, "POST /generate, to the first token": first}
    limits = httpx.Timeout(60)
    with (
        httpx.Client(base_url=f"http://127.0.0.1:{plain_port}", timeout=limits) as plain,
        httpx.Client(base_url=f"http://127.0.0.1:{cluster_port}", timeout=limits) as cluster,
    ):
        return {kind: _compared([plain, cluster], ask, names, f"{seed} {kind}") for kind, ask in kinds.items()}


def _compared(clients: Sequence[httpx.Client], ask: Ask, names: Sequence[str], seed: str) -> Mapping[str, float]:
    times: list[list[float]] = [[], []]
    for number in range(NUM_WARM + NUM_REQUESTS):
        document: dict[str, object] = {
            "prompt": prompt(f"{seed} {number}", PROMPT_WORDS), "adapter": names[number % 2],
            "max_tokens": NUM_TOKENS, "ignore_eos": True,
        }  # fmt: skip
        for index in (0, 1) if number % 2 else (1, 0):
            started = time.perf_counter()
            ask(clients[index], document)
            times[index].append(1e3 * (time.perf_counter() - started))
    plain, cluster = (statistics.median(samples[NUM_WARM:]) for samples in times)
    return {"plain_ms": plain, "more_ms": cluster - plain}


def health(client: httpx.Client, _: dict[str, object]) -> None:
    """Send a request that needs no engine."""
    client.get("/health").raise_for_status()


def whole(client: httpx.Client, document: dict[str, object]) -> None:
    """Send a request and wait for the whole answer."""
    client.post("/generate", json=document).raise_for_status()


def first(client: httpx.Client, document: dict[str, object]) -> None:
    """Send a request and wait for the first token. It is the only token, so the rest of the answer disturbs no later request."""
    with client.stream("POST", "/generate", json=document | {"stream": True, "max_tokens": 1}) as answer:
        answer.raise_for_status()
        next(answer.iter_bytes())
