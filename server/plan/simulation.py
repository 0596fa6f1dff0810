"""Simulation of replicas that serve very many adapters, some popular and most not, under a routing policy.

Arrivals are a Poisson process, popularity is Zipf's, and the lengths of answers are geometric. The same seed gives the same
requests to each policy. The policy "affinity" is that of the cluster: `server.affinity`.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from server.affinity import ANY, LoadBound, key_of, preferred, ranked
from server.plan.replica import Replica, ReplicaSizes, SimulatedRequest

Policy = Literal["affinity", "least loaded", "random"]
POLICIES: tuple[Policy, ...] = ("affinity", "least loaded", "random")
Route = Callable[[str, Mapping[str, int]], str]
"""Function that returns the replica for a request of an adapter, given the requests under way at each replica."""
WARM_UP = 0.2
"""The share of the requests that is not counted, because the adapters have not found their replicas yet."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests in the order of their arrival, (requests,) each: times, adapters, numbers of tokens."""

    arrivals: npt.NDArray[np.float64]
    adapters: npt.NDArray[np.int64]
    num_tokens: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a simulation, over the requests after the warm-up."""

    policy: Policy
    num_replicas: int
    num_requests: int
    """All requests that were answered, with those of the warm-up."""
    num_loads: int
    """Adapters read from disk, with those of the warm-up."""
    hit_rate: float
    """The share of requests whose adapter was resident at their replica."""
    loads_per_s: float
    """Adapters read from disk a second, over all replicas."""
    p99_wait_s: float
    """Seconds until a request's first step, for its adapter and for a place. 99 of 100 requests wait less."""
    p50_s: float
    p99_s: float
    """Seconds until the end of the answer."""
    imbalance: float
    """Requests of the busiest replica, relative to the mean."""
    first_share: float
    """The share of requests that went to the replica that ranks first for their adapter."""


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
    traffic: Traffic, policy: Policy, num_replicas: int, sizes: ReplicaSizes, seed: int, on_end: Callable[[], object] = bool
) -> Outcome:
    """Run all requests to their ends. Calls `on_end` after each."""
    replicas = {f"replica-{i}": Replica(sizes) for i in range(num_replicas)}
    loads = dict.fromkeys(replicas, 0)
    route, requests, chosen, num_loads = _route(policy, [*replicas], seed), _requests(traffic), list[str](), list[int]()

    def run_until(now: float) -> None:
        while (soonest := min(replicas.items(), key=_next_at))[1].next_at < now:
            name, replica = soonest
            if replica.step():
                loads[name] -= 1
                on_end()

    for request in requests:
        run_until(request.arrived)
        num_loads.append(sum(replica.num_loads for replica in replicas.values()))
        name = route(request.adapter, loads)
        chosen.append(name)
        loads[name] += 1
        replicas[name].arrive(request, request.arrived)
    run_until(math.inf)
    assert not any(loads.values())
    return _outcome(policy, requests, chosen, num_loads, replicas)


def _requests(traffic: Traffic) -> list[SimulatedRequest]:
    columns = (column.tolist() for column in (traffic.adapters, traffic.num_tokens, traffic.arrivals))
    return [
        SimulatedRequest(f"adapter-{adapter}", num_tokens, arrived) for adapter, num_tokens, arrived in zip(*columns, strict=True)
    ]


def _next_at(item: tuple[str, Replica]) -> float:
    return item[1].next_at


def _outcome(
    policy: Policy,
    requests: Sequence[SimulatedRequest],
    chosen: Sequence[str],
    num_loads: Sequence[int],
    replicas: Mapping[str, Replica],
) -> Outcome:
    """Return the outcome. `chosen` has the replica of each request, `num_loads` the adapters read before each came."""
    first_of = cache(lambda adapter: ranked(key_of([adapter]), replicas)[0])
    start = int(WARM_UP * len(requests))
    counted, counted_replicas = requests[start:], chosen[start:]
    p50, p99 = np.quantile([request.ended - request.arrived for request in counted], [0.5, 0.99]).tolist()
    return Outcome(
        policy=policy,
        num_replicas=len(replicas),
        num_requests=sum(math.isfinite(request.ended) for request in requests),
        num_loads=sum(replica.num_loads for replica in replicas.values()),
        hit_rate=float(np.mean([request.is_hit for request in counted])),
        loads_per_s=(num_loads[-1] - num_loads[start]) / (counted[-1].arrived - counted[0].arrived),
        p99_wait_s=float(np.quantile([request.started - request.arrived for request in counted], 0.99)),
        p50_s=p50,
        p99_s=p99,
        imbalance=max(Counter(counted_replicas).values()) * len(replicas) / len(counted_replicas),
        first_share=float(
            np.mean([name == first_of(request.adapter) for name, request in zip(counted_replicas, counted, strict=True)])
        ),
    )


def _route(policy: Policy, names: Sequence[str], seed: int) -> Route:
    if policy == "random":
        g = np.random.default_rng([seed, 1])
        return lambda _, __: names[int(g.integers(len(names)))]
    bound = LoadBound()
    if policy == "least loaded":
        return lambda _, loads: preferred(ANY, loads, bound)[0]
    return lambda adapter, loads: preferred(key_of([adapter]), loads, bound)[0]
