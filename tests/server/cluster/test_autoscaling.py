"""Replicas that are added under load and removed after it, without the loss of a request."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Event

import pytest

from server.client import Client
from server.schemas.generation import DoneData
from tests.server.cluster.running import NAMES, START_S, adapters_of_each, running
from tests.server.live import wait_until

pytestmark = pytest.mark.cluster
PROMPT = "Question: What is 2 + 3?\nAnswer:"
FLAGS = ["--replicas", "1", "--max-replicas", "2", "--target-requests", "4", "--threads", "1"]
FLAGS += ["--upscale-delay-s", "1", "--downscale-delay-s", "3", "--drain-s", "240"]
LONG = 300
"""Tokens of a stream. It ends some seconds after its replica is asked to end."""


def _ask_until(client: Client, is_over: Event, place: int) -> int:
    num_asked = 0
    while not is_over.is_set():
        reply = client.generate(prompt=PROMPT, adapter=NAMES[place % 4], max_tokens=16, ignore_eos=True)
        assert reply.usage.completion_tokens == 16
        num_asked += 1
    return num_asked


def _read_until(client: Client, is_over: Event, adapters: Sequence[str]) -> int:
    num_read = 0
    while not is_over.is_set():
        *_, last = client.stream(prompt=PROMPT, adapter=adapters, max_tokens=LONG, ignore_eos=True)
        assert isinstance(last, DoneData)
        assert last.usage.completion_tokens == LONG
        num_read += 1
    return num_read


def test_replicas_come_and_go_with_the_load(tmp_path: Path) -> None:
    """Expect a second replica under load; after the load, one ends once its streams have ended."""
    with running(tmp_path / "log", *FLAGS) as cluster, ExitStack() as stack:
        client = stack.enter_context(Client(cluster.url, timeout_s=240))
        pool = stack.enter_context(ThreadPoolExecutor(12))
        is_calm, is_over = Event(), Event()
        stack.callback(is_calm.set)
        stack.callback(is_over.set)
        assert len(cluster.names()) == 1
        began = time.monotonic()
        asked = [pool.submit(_ask_until, client, is_calm, place) for place in range(8)]
        wait_until(lambda: len(cluster.names()) == 2, "a second replica", START_S)
        came = time.monotonic()
        streams = [pool.submit(_read_until, client, is_over, one) for one in adapters_of_each(cluster.names()).values()]
        wait_until(lambda: all(cluster.by_replica("vllm:num_requests_running").values()), "both to have work")
        is_calm.set()
        calm = time.monotonic()
        assert all(one.result() > 0 for one in asked)
        wait_until(lambda: len(cluster.names()) == 1, "a replica to go, from which a stream is read")
        went = time.monotonic()
        is_over.set()
        assert all(one.result(timeout=240) > 0 for one in streams)
        print(f"one came {came - began:.0f} s after the load, and went {went - calm:.0f} s after its end")
        assert client.generate(prompt=PROMPT, adapter="math", max_tokens=1).usage.completion_tokens == 1
