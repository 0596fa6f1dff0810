"""What the routes work with: admitted requests in, their events out, and the server's own facts."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace

from anyio import Lock

from server.access.caller import Caller
from server.access.key_ring import KeyRing
from server.access.limits import Limiter, RateLimiter
from server.catalog.admin import AdapterAdmin
from server.catalog.files import AdapterFiles
from server.catalog.uses import AdapterUses
from server.engine.adapters.registry import Registry, check_registered
from server.engine.admission import Admission, Ask, Caps, RefusedError, check_scores, size_of
from server.engine.request import Event, Request
from server.engine.thread import EngineDeadError, EngineThread
from server.errors import BusyError, DrainingError
from server.grammar_checks import GrammarChecks
from server.settings import MIB, Settings
from server.telemetry.account import Account
from server.telemetry.metrics import Metrics
from server.text_threads import TenantTurns, TextThreads
from server.transport.bodies import Bodies, most_held
from server.transport.exchange import current

HasLeft = Callable[[], Awaitable[bool]]


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
    num_ingresses: int = 0
    """Ingresses in front of this replica, which count the requests of tenants; 0: this process counts them."""
    files: AdapterFiles | None = None
    """Where adapters come from while the server runs; None: none come."""
    required: Callable[[], Collection[str]] = tuple
    """Gives the references of adapters that tenants cannot do without."""
    outline: str = ""
    """What is served, and how much fits, for the log."""
    texts: TextThreads = field(default_factory=TextThreads)
    parsing: Lock = field(default_factory=Lock)
    """Held by the one long body that is parsed."""
    parsing_turns: TenantTurns = field(default_factory=lambda: TenantTurns(1))
    """For a client's long bodies: one of each waits for `parsing`."""
    bodies: Bodies = field(init=False)
    """The bytes of the bodies of requests under way."""
    caps: Caps = field(init=False)
    """What any request may cost; a tenant's may be less."""
    uses: AdapterUses = field(default_factory=AdapterUses)
    rate: RateLimiter = field(init=False)
    admin: AdapterAdmin = field(init=False)
    grammar_checks: GrammarChecks = field(init=False)
    base_aliases: frozenset[str] = frozenset()
    """Other names by which requests may ask for the base model; no reply says them."""
    base_names: frozenset[str] = field(init=False)
    """All of them."""
    num_requests: int = field(default=0, init=False)
    """That are being admitted, wait, run, or whose answer is being sent."""
    is_draining: bool = field(default=False, init=False)
    """Whether the server is about to end: it is not ready any more, and answers on no connection twice."""

    def __post_init__(self) -> None:
        help_text = "Requests, from their first check to the last byte of their answers."
        self.metrics.watch("lori:requests_under_way", help_text, lambda: self.num_requests)
        self.base_names = self.base_aliases | {self.base_model}
        self.rate = RateLimiter(self.num_ingresses or 1)
        self.grammar_checks = GrammarChecks(self.admission)
        self.bodies = Bodies(self.settings.max_bodies_mib * MIB, most_held(self.settings.max_body_bytes))
        self.caps = Caps(self.settings.max_request_s, self.settings.max_request_tokens)
        self.admin = AdapterAdmin(self.registry, self.uses, self.engine, self.files, lambda: self.required())

    @asynccontextmanager
    async def admitted(
        self, asks: Sequence[Ask], caller: Caller, *, is_whole: bool = True, has_left: HasLeft | None = None
    ) -> AsyncGenerator[list[Request], None]:
        """Give the caller's requests, which have their places until the block ends, or raises what the error table knows.

        All are admitted or none; `is_whole` says that no answer is streamed. Where all places are taken, a tenant that has none
        is given one more. Long prompts are encoded off the event loop, when the places are taken already. `has_left` says whether
        the client is gone: then a grammar whose turn comes is not checked, and `ClientDisconnect` is raised.
        """
        self.check_alive()
        num_answers = sum(ask.num_choices for ask in asks)
        self._check_possible(caller, len(asks), num_answers)
        is_first = len(asks) == 1 and not self.limiter.num_under_way(caller)
        if self.num_requests + len(asks) > self.settings.max_requests and not is_first:
            raise BusyError(
                f"{self.num_requests} requests are under way, and the limit is {self.settings.max_requests}; try again"
            )
        with ExitStack() as held:
            held.enter_context(self.limiter.places(caller, num_answers))
            if not self.num_ingresses:
                self.rate.count(caller, len(asks) - 1)  # one was counted at the gate
            self.num_requests += len(asks)
            held.callback(self._give_back, len(asks))
            caps = self.caps.lowered(caller.max_request_s, caller.max_request_tokens)
            requests = await self.texts.run(
                lambda: [self.admission.admit(_by(caller, ask, caps)) for ask in asks],
                caller.tenant,
                sum(size_of(ask.prompt) for ask in asks),
            )
            check_scores(requests, is_whole=is_whole)
            for grammar in dict.fromkeys(request.grammar for request in requests if request.grammar):  # last: it may take long
                await self.grammar_checks.check(grammar, caller.tenant, has_left or _stays)
            self.check_alive()
            for request in requests:
                check_registered(self.registry, request, caller.may_use)
            for request in requests:
                terms = (*request.terms, *request.policy)
                held.enter_context(self.uses.held(terms))
                self.metrics.count_admitted([term.name for term in terms])
            yield requests

    def _check_possible(self, caller: Caller, num_requests: int, num_answers: int) -> None:
        # What could never be, however often it is tried.
        limits = (self.settings.max_requests, caller.max_requests, self.rate.limit(caller))
        if num_requests > (most := min(limit for limit in limits if limit is not None)):
            raise RefusedError(
                "prompt", f"has {num_requests} texts, expected {most} at most: no more may ever be under way at once"
            )
        if caller.max_requests is not None and num_answers > caller.max_requests:
            said = f"asks for {num_answers} answers, expected {caller.max_requests} at most: the tenant may have no more at once"
            raise RefusedError("n", said)

    def _give_back(self, num_requests: int) -> None:
        self.num_requests -= num_requests

    def check_ready(self) -> None:
        """Raise `EngineDeadError` or `DrainingError` where no more requests should be sent here."""
        self.check_alive()
        if self.is_draining:
            raise DrainingError("the server is about to end")

    def check_alive(self) -> None:
        """Raise `EngineDeadError` where the engine has ended."""
        if not self.engine.is_alive:
            raise EngineDeadError("the engine is not running")

    async def generate(self, request: Request) -> AsyncGenerator[Event, None]:
        """Yield the request's events and counts them; closing it aborts the request."""
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


async def _stays() -> bool:
    return False


def _by(caller: Caller, ask: Ask, caps: Caps) -> Ask:
    # No route can forget whose request it is, or what it may cost.
    priority = ask.priority
    if caller.tenant:
        priority = caller.priority if priority is None else max(priority, caller.priority)
    return replace(ask, tenant=caller.tenant, may_use=caller.may_use, policy=caller.policy, priority=priority, caps=caps)
