"""What the routes work with: one admitted request in, its events out, and the server's own facts."""

from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

from starlette.concurrency import run_in_threadpool

from server.account import Account
from server.engine.adapters.registry import Registry
from server.engine.admission import Admission, Ask
from server.engine.request import Event, Request
from server.engine.thread import EngineDeadError, EngineThread
from server.errors import BusyError, DrainingError
from server.exchange import current
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
    num_requests: int = field(default=0, init=False)
    """That are being admitted, wait, run, or whose answer is being sent."""
    is_draining: bool = field(default=False, init=False)
    """Whether the server is about to end: it is not ready any more, and answers on no connection twice."""

    def __post_init__(self) -> None:
        help_text = "Requests, from their first check to the last byte of their answers."
        self.metrics.watch("lori:requests_under_way", help_text, lambda: self.num_requests)

    @asynccontextmanager
    async def admitted(self, ask: Ask) -> AsyncGenerator[Request, None]:
        """Gives the request, which has its place until the block ends, or raises what the error table knows.

        Long prompts are encoded off the event loop, when the place is taken already.
        """
        self._check_alive()
        if self.num_requests >= self.settings.max_requests:
            raise BusyError(f"{self.num_requests} requests are under way, which is the limit; try again")
        self.num_requests += 1
        try:
            request = await run_in_threadpool(self.admission.admit, ask)
            self._check_alive()
            self.metrics.count_admitted([term.name for term in request.terms])
            yield request
        finally:
            self.num_requests -= 1

    def check_ready(self) -> None:
        """Raises `EngineDeadError` or `DrainingError` where no more requests should be sent here."""
        self._check_alive()
        if self.is_draining:
            raise DrainingError("the server is about to end")

    def _check_alive(self) -> None:
        if not self.engine.is_alive:
            raise EngineDeadError("the engine is not running")

    async def generate(self, request: Request) -> AsyncGenerator[Event, None]:
        """Yields the request's events and counts them; closing it aborts the request."""
        account = Account(request, self.metrics, self.settings.log_prompts)
        if exchange := current.get():
            exchange.accounts.append(account)
        try:
            async with aclosing(self.engine.generate(request)) as events:
                async for event in events:
                    account.hear(event)
                    yield event
        finally:
            account.close()
