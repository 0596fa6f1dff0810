"""Simulates replicas that serve very many adapters, some popular and most not, under one way to route requests or another.

Arrivals are a Poisson process, popularity is Zipf's, answers' lengths are geometric. The same seed gives the same requests to
each way. Routing by affinity is what the cluster does: `server.cluster.affinity`.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from server.cluster.affinity import ANY, LoadBound, key_of, preferred, ranked
from server.plan.replica import Asked, Replica, ReplicaSizes

Policy = Literal["affinity", "least loaded", "random"]
POLICIES: tuple[Policy, ...] = ("affinity", "least loaded", "random")
Route = Callable[[str, Mapping[str, int]], str]
"""Returns the replica for a request of an adapter, given how many requests each has under way."""
WARM_UP = 0.2
"""The share of the requests that is not counted, for adapters are not where they will be yet."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests in the order of their arrival, (requests,) each: when, for which adapter, how many tokens."""

    arrivals: npt.NDArray[np.float64]
    adapters: npt.NDArray[np.int64]
    num_tokens: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How requests fared, those after the warm-up."""

    policy: Policy
    num_replicas: int
    num_requests: int
    """All that were answered, the warm-up's too."""
    num_loads: int
    """Of all of them."""
    hit_rate: float
    """The share whose adapter was resident where they came."""
    loads_per_s: float
    """Adapters read from disk a second, over all replicas."""
    p99_wait_s: float
    """Until a request's first step: for its adapter, and for a place. 99 of 100 wait less."""
    p50_s: float
    p99_s: float
    """Until the answers' ends."""
    imbalance: float
    """Requests of the replica that had most, to the mean."""
    first_share: float
    """The share that came to the replica that ranks first for their adapter."""


def draw_traffic(*, num_adapters: int, num_requests: int, rps: float, zipf: float, mean_tokens: float, seed: int) -> Traffic:
    """Return requests for adapters 0, the most popular, to `num_adapters` - 1."""
    g = np.random.default_rng(seed)
    shares = np.arange(1, num_adapters + 1, dtype=np.float64) ** -zipf
    return Traffic(
        arrivals=np.cumsum(g.exponential(1 / rps, num_requests)),
        adapters=g.choice(num_adapters, num_requests, p=shares / shares.sum()),
        num_tokens=g.geometric(1 / mean_tokens, num_requests),
    )


def simulate(
    traffic: Traffic, policy: Policy, num_replicas: int, sizes: ReplicaSizes, seed: int, tell: Callable[[], object] = bool
) -> Outcome:
    """Run all requests to their ends. `tell` is called whenever one has ended."""
    replicas = {f"replica-{i}": Replica(sizes) for i in range(num_replicas)}
    loads = dict.fromkeys(replicas, 0)
    route, asked, chosen, num_loads = _route(policy, [*replicas], seed), _asked(traffic), list[str](), list[int]()

    def run_until(now: float) -> None:
        while (soonest := min(replicas.items(), key=_next_at))[1].next_at < now:
            name, replica = soonest
            if replica.step():
                loads[name] -= 1
                tell()

    for one in asked:
        run_until(one.arrived)
        num_loads.append(sum(of.num_loads for of in replicas.values()))
        name = route(one.adapter, loads)
        chosen.append(name)
        loads[name] += 1
        replicas[name].arrive(one, one.arrived)
    run_until(math.inf)
    assert not any(loads.values())
    return _outcome(policy, asked, chosen, num_loads, replicas)


def _asked(traffic: Traffic) -> list[Asked]:
    columns = (of.tolist() for of in (traffic.adapters, traffic.num_tokens, traffic.arrivals))
    return [Asked(f"adapter-{adapter}", num_tokens, arrived) for adapter, num_tokens, arrived in zip(*columns, strict=True)]


def _next_at(item: tuple[str, Replica]) -> float:
    return item[1].next_at


def _outcome(
    policy: Policy, asked: Sequence[Asked], chosen: Sequence[str], num_loads: Sequence[int], replicas: Mapping[str, Replica]
) -> Outcome:
    """Sum up: `chosen` is where each request went, `num_loads` how many adapters had been read when each came."""
    first_of = cache(lambda adapter: ranked(key_of([adapter]), replicas)[0])
    start = int(WARM_UP * len(asked))
    counted, where = asked[start:], chosen[start:]
    p50, p99 = np.quantile([one.ended - one.arrived for one in counted], [0.5, 0.99]).tolist()
    return Outcome(
        policy=policy,
        num_replicas=len(replicas),
        num_requests=sum(math.isfinite(one.ended) for one in asked),
        num_loads=sum(of.num_loads for of in replicas.values()),
        hit_rate=float(np.mean([one.is_hit for one in counted])),
        loads_per_s=(num_loads[-1] - num_loads[start]) / (counted[-1].arrived - counted[0].arrived),
        p99_wait_s=float(np.quantile([one.started - one.arrived for one in counted], 0.99)),
        p50_s=p50,
        p99_s=p99,
        imbalance=max(Counter(where).values()) * len(replicas) / len(where),
        first_share=float(np.mean([name == first_of(one.adapter) for name, one in zip(where, counted, strict=True)])),
    )


def _route(policy: Policy, names: Sequence[str], seed: int) -> Route:
    if policy == "random":
        g = np.random.default_rng([seed, 1])
        return lambda _, __: names[int(g.integers(len(names)))]
    bound = LoadBound()
    if policy == "least loaded":
        return lambda _, loads: preferred(ANY, loads, bound)[0]
    return lambda adapter, loads: preferred(key_of([adapter]), loads, bound)[0]
