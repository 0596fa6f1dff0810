"""Kill of a replica under load: lost requests, and the time until the replica is replaced."""

import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from server.client import Client
from server.client.errors import ClientError
from tests.bench.cluster_targets import Cluster
from tests.bench.serve_asks import prompt

NUM_USERS, NUM_TOKENS, PROMPT_WORDS = 8, 32, 50
BEFORE_S = 3.0
"""Seconds of load before the kill."""
LIMIT_S = 120.0
POLL_S = 0.5
"""Seconds between two checks for the new replica. Each check takes about 50 ms of the cores on which the replica starts."""


def kill_one(cluster: Cluster, names: Sequence[str]) -> dict[str, float]:
    """Kill a replica while users alternately request whole answers and streams. Return the counts of lost requests.

    `asked`: all requests. `lost`: requests that the client library gave up before any part of the answer. `begun`: streams that
    broke. `seconds`: time from the kill until as many replicas answer as before, under continued load.
    """
    counts = {"asked": 0, "lost": 0, "begun": 0}
    ended, lock = threading.Event(), threading.Lock()

    def count(key: str) -> None:
        with lock:
            counts[key] += 1

    def user(index: int) -> None:
        with Client(f"http://127.0.0.1:{cluster.server.port}", timeout_s=LIMIT_S, num_retries=5) as client:
            number = 0
            while not ended.is_set():
                number += 1
                count("asked")
                adapter = names[(index + number) % len(names)]
                fields = {"prompt": prompt(f"{time.time()} {index}", PROMPT_WORDS), "adapter": adapter}
                has_begun = False
                try:
                    if number % 2:
                        client.generate(**fields, max_tokens=NUM_TOKENS, ignore_eos=True)
                    else:
                        for _ in client.stream(**fields, max_tokens=NUM_TOKENS, ignore_eos=True):
                            has_begun = True
                except ClientError:
                    count("begun" if has_begun else "lost")

    with ThreadPoolExecutor(NUM_USERS) as pool:
        users = [pool.submit(user, index) for index in range(NUM_USERS)]
        try:
            time.sleep(BEFORE_S)
            before, victim = cluster.names(), cluster.replicas()[0]
            os.kill(victim.pid, signal.SIGKILL)
            killed = time.monotonic()
            while len(names_now := cluster.names()) < len(before) or names_now == before:
                if time.monotonic() - killed > LIMIT_S:
                    raise TimeoutError(f"no other replica within {LIMIT_S:g} s")
                time.sleep(POLL_S)
            seconds = time.monotonic() - killed
        finally:
            ended.set()
    for task in users:
        task.result()
    return {**counts, "seconds": seconds}
