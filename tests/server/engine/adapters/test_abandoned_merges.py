"""Merges whose client leaves: the build is cancelled, so that the next client's merge begins."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from lori.adapter import Adapter
from lori.errors import MergeCancelledError
from lori.merge import merge
from server.engine.adapters import loader
from server.loading import load_service
from server.service.service import Service
from server.settings import Settings
from tests.server.live import LIMIT_S, serve_here, wait_until


@dataclass
class Builder:
    """The server's merge function, recorded. The first merge blocks until it is cancelled or `may_end` is set."""

    outcomes: list[str] = field(default_factory=list)
    has_begun: threading.Event = field(default_factory=threading.Event)
    may_end: threading.Event = field(default_factory=threading.Event)

    def merge(self, *args: Any, is_cancelled: Callable[[], bool], **options: Any) -> Adapter:
        if not self.has_begun.is_set():
            self.has_begun.set()
            wait_until(lambda: is_cancelled() or self.may_end.is_set(), "the end of the first merge")
        try:
            merged = merge(*args, is_cancelled=is_cancelled, **options)
        except MergeCancelledError:
            self.outcomes.append("cancelled")
            raise
        self.outcomes.append("built")
        return merged


@pytest.fixture
def service(writer_model: Path, adapters: Path) -> Service:
    return load_service(Settings(model=str(writer_model), adapters=adapters, dtype="float32", threads=1, kv_cache_gib=0.01))


@pytest.fixture
def client(service: Service) -> Iterator[httpx.Client]:
    with serve_here(service) as client:
        yield client


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Builder:
    builder = Builder()
    monkeypatch.setattr(loader, "merge", builder.merge)
    return builder


def body(method: str) -> dict[str, Any]:
    return {"prompt": "x", "adapter": ["math", "safety"], "merge": method, "density": 0.5, "max_tokens": 2}


@pytest.mark.slow
def test_the_next_merge_begins_when_the_client_of_the_current_one_leaves(client: httpx.Client, builder: Builder) -> None:
    """Regression: the abandoned build went on, for 16 s with eight large adapters, and delayed all other merges."""
    with client.stream("POST", "/generate", json=body("ties") | {"stream": True}) as stream:
        assert stream.status_code == 200, stream.read()
        assert builder.has_begun.wait(LIMIT_S)
    reply = client.post("/generate", json=body("magnitude"))
    assert reply.status_code == 200
    assert builder.outcomes == ["cancelled", "built"]
    assert client.post("/generate", json=body("ties")).status_code == 200
    assert builder.outcomes == ["cancelled", "built", "built"]


def test_a_merge_whose_client_leaves_before_it_begins_is_never_begun(
    client: httpx.Client, service: Service, builder: Builder
) -> None:
    with ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, "/generate", json=body("ties"))
        assert builder.has_begun.wait(LIMIT_S)
        with client.stream("POST", "/generate", json=body("magnitude") | {"stream": True}) as stream:
            assert stream.status_code == 200, stream.read()
            wait_until(lambda: service.engine.num_requests == 2, "the second request")
        wait_until(lambda: service.engine.num_requests == 1, "the second client's leaving")
        builder.may_end.set()
        assert first.result().status_code == 200
    assert client.post("/generate", json=body("dare_ties")).status_code == 200
    assert builder.outcomes == ["built", "built"]


def test_a_merge_that_another_client_waits_for_is_built_once(client: httpx.Client, service: Service, builder: Builder) -> None:
    with ThreadPoolExecutor() as pool:
        with client.stream("POST", "/generate", json=body("ties") | {"stream": True}) as stream:
            assert stream.status_code == 200, stream.read()
            assert builder.has_begun.wait(LIMIT_S)
            second = pool.submit(client.post, "/generate", json=body("ties"))
            wait_until(lambda: service.engine.num_requests == 2, "the second request")
        wait_until(lambda: service.engine.num_requests == 1, "the first client's leaving")
        wait_until(lambda: service.engine._engine.scheduler.num_waiting == 1, "the end of the first request")
        builder.may_end.set()
        assert second.result().status_code == 200
    assert builder.outcomes == ["built"]
