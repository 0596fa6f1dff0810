"""What the routes work with: one admitted request in, its events out, and the server's own facts."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

from starlette.concurrency import run_in_threadpool

from server.access.key_ring import KeyRing
from server.access.limits import Limiter
from server.engine.adapters.registry import Registry
from server.engine.admission import Admission, Ask
from server.engine.request import DoneEvent, ErrorEvent, Event, Request, TextEvent
from server.engine.thread import EngineDeadError, EngineThread
from server.errors import BusyError
from server.metrics import Metrics
from server.settings import Settings


@dataclass(slots=True)
class Service:
    """One served base model."""

    settings: Settings
    base_model: str
    registry: Registry
    admission: Admission
    engine: EngineThread
    metrics: Metrics
    keys: KeyRing | None = None
    """Whose requests are answered; None: anybody's."""
    limiter: Limiter = field(default_factory=Limiter)
    num_requests: int = field(default=0, init=False)
    """That are being admitted, wait, run, or whose answer is being sent."""

    @asynccontextmanager
    async def admitted(self, ask: Ask) -> AsyncGenerator[Request, None]:
        """Gives the request, which has its place until the block ends, or raises what the error table knows.

        Long prompts are encoded off the event loop, when the place is taken already.
        """
        self._check_alive()
        if self.num_requests >= self.settings.max_requests:
            raise BusyError(f"{self.num_requests} requests are under way, which is the limit; try again")
        with self.limiter.place(ask.caller):
            self.num_requests += 1
            try:
                request = await run_in_threadpool(self.admission.admit, ask)
                self._check_alive()
                for term in request.terms:
                    self.metrics.adapter_requests.labels(term.name).inc()
                yield request
            finally:
                self.num_requests -= 1

    def _check_alive(self) -> None:
        if not self.engine.is_alive:
            raise EngineDeadError("the engine is not running")

    async def generate(self, request: Request) -> AsyncGenerator[Event, None]:
        """Yields the request's events and counts them; closing it aborts the request."""
        started, is_first, reason = time.monotonic(), True, "cancelled"
        try:
            async with aclosing(self.engine.generate(request)) as events:
                async for event in events:
                    if is_first and isinstance(event, TextEvent) and not event.is_prompt:
                        self.metrics.first_token.observe(time.monotonic() - started)
                        is_first = False
                    if isinstance(event, DoneEvent):
                        reason = event.finish_reason
                        # All choices have one prompt.
                        self.metrics.prompt_tokens.inc(event.num_prompt_tokens if event.choice == 0 else 0)
                        self.metrics.generation_tokens.inc(event.num_completion_tokens)
                    elif isinstance(event, ErrorEvent):
                        reason = "error"
                    yield event
        finally:
            self.metrics.success.labels(self.metrics.base_model, reason).inc()
            self.metrics.latency.observe(time.monotonic() - started)
