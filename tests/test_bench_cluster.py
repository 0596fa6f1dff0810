"""The benchmark of replicas: throughput, load balance and affinity."""

import asyncio
from collections import Counter

import pytest

from tests.bench.cluster import affinity
from tests.bench.cluster_throughput import NUM_TOKENS, Window, counted, throughput
from tests.bench.serve_asks import Ask, no_adapter
from tests.bench.serve_load import Send
from tests.bench.serve_wire import Reply


@pytest.mark.parametrize(
    ("asked", "ended", "share"),
    [(0, 9, 0), (5, 15, 0.5), (12, 14, 1), (10, 20, 1), (5, 25, 0.5), (18, 28, 0.2), (21, 30, 0)],
)
def test_an_answer_counts_with_its_fraction_inside_the_window(asked: float, ended: float, share: float) -> None:
    assert counted(asked, ended, 10, 20) == pytest.approx(share)


def test_servers_share_requests_and_users() -> None:
    asked: list[Counter[str]] = [Counter(), Counter()]
    running, most = [0, 0], [0, 0]

    def server(place: int) -> Send:
        async def send(one: Ask) -> Reply:
            reply = Reply(num_completion=one.num_tokens)
            asked[place][one.prompt] += 1
            running[place] += 1
            most[place] = max(most[place], running[place])
            await asyncio.sleep(0.01)
            running[place] -= 1
            return reply

        return send

    measured = throughput([server(0), server(1)], 6, no_adapter, "seed", Window(0.02, 0.1))
    assert measured.tokens_per_s >= NUM_TOKENS
    assert measured.cores >= 0
    assert most == [3, 3]
    assert max((asked[0] + asked[1]).values()) == 1


def test_affinity_is_the_share_answered_by_each_adapters_busiest_replica() -> None:
    before = {"math": {"one": 3.0}}
    after = {"math": {"one": 12.0, "other": 1.0}, "safety": {"other": 10.0}}
    assert affinity(before, after) == pytest.approx(19 / 20)
