"""Tokens a second by the number of requests that run together, and the requests that measure them on a server."""

import pytest

from server.client import ClientError
from server.plan.speed import NUM_ALONE, NUM_EACH, Speed, measure
from tests.server.live import Live


def test_one_user_and_many_get_the_measured_speeds() -> None:
    speed = Speed(single=100, together=400, users=8)
    assert speed.seconds_per_token(1) == 0.01
    assert speed.seconds_per_token(8) == 0.02
    assert 0.01 < speed.seconds_per_token(4) < 0.02


def test_more_users_than_were_measured_get_no_more_tokens() -> None:
    speed = Speed(single=100, together=400, users=8)
    assert 16 / speed.seconds_per_token(16) == pytest.approx(400)


def test_a_small_batch_has_the_speed_of_as_many_users() -> None:
    speed = Speed(single=121, together=587, users=32)
    assert speed.at_most(4) == pytest.approx(4 / speed.seconds_per_token(4))
    assert 121 < speed.at_most(4) < 320
    assert speed.at_most(32) == speed.at_most(64) == Speed(None, 587, 32).at_most(64) == 587


def test_a_ratio_slows_all_speeds() -> None:
    assert Speed(100, 400, 8).times(0.5) == Speed(50, 200, 8)
    assert Speed(None, 400, 8).times(0.5) == Speed(None, 200, 8)


def test_a_server_is_measured_by_requests_without_adapters_that_share_nothing(live: Live) -> None:
    names = ("vllm:generation_tokens_total", "vllm:prompt_tokens_total", "vllm:prefix_cache_hits_total")
    before = [live.metric(name) for name in names]
    speed = measure(live.url, users=2, prompt_tokens=40, completion_tokens=5, num_ids=256)
    num_requests = 1 + NUM_ALONE + NUM_EACH * 2
    increases = [live.metric(name) - earlier for name, earlier in zip(names, before, strict=True)]
    assert increases == [5 * num_requests, 40 * num_requests, 0]
    assert speed.users == 2
    assert speed.together > 0
    assert speed.single
    assert speed.single > 0


def test_a_missing_server_is_an_error() -> None:
    with pytest.raises(ClientError):
        measure("http://127.0.0.1:9", users=2, prompt_tokens=4, completion_tokens=2, num_ids=256)
