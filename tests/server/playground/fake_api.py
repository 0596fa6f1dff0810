"""A fake of the API with the real wire format, for cases that a tiny server cannot show: thousands of adapters, keys, faults."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from server.routes import playground
from tests.server.live import LIMIT_S, serve_app

TIMINGS = {"queue_s": 0.003, "prefill_s": 0.02, "decode_s": 0.5, "time_to_first_token_s": 0.042, "total_s": 0.6}
KEEP_ALIVE = b": keep-alive\r\n\r\n"


def row(name: str, **changes: Any) -> dict[str, Any]:
    """Return a row of GET /adapters."""
    return {
        "name": name, "version": "0123456789ab", "rank": 32, "alpha": 64.0, "sparsity": 0.9, "density": 0.1,
        "templates": ["plain"], "merge_weights": {}, "metrics": {}, "bytes_on_disk": 1_340_000, "bytes_loaded": None,
        "bytes_resident": None, "tier": "disk", "is_pinned": False, "num_using": 0, "last_used": None, "num_requests": 0,
    } | changes  # fmt: skip


def sse(name: str, data: dict[str, Any]) -> bytes:
    """Return one server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def token(text: str) -> bytes:
    """Return a `token` event."""
    return sse("token", {"text": text, "index": 0, "logprobs": None})


def done(num_tokens: int, **changes: Any) -> bytes:
    """Return the `done` event."""
    usage = {"prompt_tokens": 7, "completion_tokens": num_tokens, "total_tokens": 7 + num_tokens, "cached_tokens": 4}
    reply = {"id": "gen-1", "adapter": [], "merge": None, "finish_reason": "stop", "usage": usage, "seed": 5}
    return sse("done", reply | {"timings": TIMINGS} | changes)


@dataclass(slots=True)
class FakeApi:
    """The fake's answers, and the requests that it got."""

    adapters: list[dict[str, Any]] = field(default_factory=lambda: [row("math"), row("safety")])
    stream: list[bytes] = field(default_factory=lambda: [token("a "), KEEP_ALIVE, token("b"), done(2)])
    """The pieces of every answer. All but the first wait for `may_go_on`."""
    may_go_on: threading.Event = field(default_factory=threading.Event)
    faulty: list[dict[str, Any]] = field(default_factory=list)
    key: str = ""
    """The key that every route requires; none if empty."""
    may_monitor: bool = True
    num_tokens: int = 0
    num_running: int = 3
    bodies: list[dict[str, Any]] = field(default_factory=list)
    bearers: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.may_go_on.set()

    def refusal(self, http: Request) -> JSONResponse | None:
        """Return the refusal of a request without the key, or None."""
        self.bearers.append(http.headers.get("authorization", ""))
        if not self.key or self.bearers[-1] == f"Bearer {self.key}":
            return None
        return error(401, "AuthenticationError", "a key is wanted: Authorization: Bearer …", None)

    def pieces(self) -> Iterator[bytes]:
        """Yield the pieces of the stream."""
        first, *others = self.stream
        yield first
        assert self.may_go_on.wait(LIMIT_S)
        for piece in others:
            time.sleep(0.002)
            yield piece


def error(status: int, kind: str, message: str, param: str | None) -> JSONResponse:
    """Return a reply in the shape of every error."""
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": status}}, status)


def make_app(fake: FakeApi) -> FastAPI:
    """Return an app that serves the real page on top of the fake."""
    app = FastAPI()
    app.include_router(playground.router)
    app.mount("/static", playground.static)

    @app.get("/adapters", response_model=None)
    def adapters(http: Request) -> Response | dict[str, Any]:
        return fake.refusal(http) or {
            "base_model": "fake-base",
            "adapters": fake.adapters,
            "faulty": fake.faulty,
            "default_merge": "linear",
        }

    @app.get("/adapters/compare", response_model=None)
    def compare(http: Request, names: str) -> Response | dict[str, Any]:
        columns = names.split(",")

        def asymmetric(i: int, j: int) -> float | None:
            return None if i + j == 1 else (10 * i + j) / 100

        def matrix(itself: float, other: Callable[[int], float | None]) -> list[list[float | None]]:
            return [[itself if i == j else other(i + j) for j in range(len(columns))] for i in range(len(columns))]

        # The first two adapters are on two different bases.
        return fake.refusal(http) or {
            "names": columns,
            "cosine": matrix(1.0, lambda n: (n % 21 - 10) / 50),
            "overlap": matrix(1.0, lambda n: None if n == 1 else 0.1 + n / 100),
            "chance_overlap": matrix(0.15, lambda n: None if n == 1 else 0.15),
            "sign_conflict": matrix(0.0, lambda n: None if n == 1 else 0.3 + n / 50),
            "auto_weight": [[asymmetric(i, j) for j in range(len(columns))] for i in range(len(columns))],
        }

    @app.get("/metrics")
    def metrics(http: Request) -> Response:
        if not fake.may_monitor:
            return error(403, "PermissionError", "this key may not read /metrics", None)
        fake.num_tokens += 100
        lines = (
            "# HELP vllm:inter_token_latency_seconds From one token to the next.",
            f'vllm:inter_token_latency_seconds_bucket{{model_name="a",le="0.1"}} {10 * fake.num_tokens}',
            f'vllm:inter_token_latency_seconds_count{{model_name="a"}} {fake.num_tokens}',
            'vllm:time_to_first_token_seconds_count{model_name="a"} 7',
            f'vllm:num_requests_running{{model_name="a"}} {fake.num_running}',
            'vllm:num_requests_waiting{model_name="a"} 1.0',
            'vllm:num_requests_waiting{model_name="b"} 1.0',
            'vllm:kv_cache_usage_perc{model_name="a"} 0.25',
        )
        return fake.refusal(http) or PlainTextResponse("\n".join(lines) + "\n")

    @app.post("/generate", response_model=None)
    def generate(http: Request, body: dict[str, Any]) -> Response:
        fake.bodies.append(body)
        return fake.refusal(http) or StreamingResponse(fake.pieces(), media_type="text/event-stream")

    return app


@contextmanager
def served(fake: FakeApi) -> Iterator[httpx.Client]:
    """Serve the page on top of `fake` until the block ends."""
    with serve_app(make_app(fake)) as client:
        yield client
        fake.may_go_on.set()
