"""The service behind the routes: admits requests, runs them, and holds the state of the server."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from time import monotonic
from typing import TypeVar

from anyio import Lock, fail_after

from lori.auto_weights import PromptQuery
from lori.errors import UnknownAdapterError
from server.access.caller import Caller
from server.access.key_ring import KeyRing
from server.access.limits import Limiter, RateLimiter
from server.catalog.admin import AdapterAdmin
from server.catalog.files import AdapterFiles
from server.catalog.uses import AdapterUses
from server.engine.adapter_selection import AdapterSelector, checked_selector, is_auto
from server.engine.adapters.registry import FaultyAdapterError, PolicyError, Registry, check_registered
from server.engine.admission import Admission, check_num_logprobs
from server.engine.generate_request import Caps, GenerateRequest, RefusedError, prompt_size
from server.engine.prompt_weights import ProbeError
from server.engine.request import Event, Request
from server.engine.thread import EngineDeadError, EngineThread
from server.errors import BusyError, DrainingError, EngineError, OutOfTimeError
from server.service.grammar_checks import GrammarChecks, check_present
from server.service.merge_admin import MergeAdmin
from server.service.named_merges import NamedMerges
from server.service.text_threads import TenantSemaphores, TextThreads
from server.settings import MIB, Settings
from server.telemetry.account import Account
from server.telemetry.exchange import current
from server.telemetry.metrics import Metrics
from server.transport.bodies import Bodies, max_counted_bytes

HasLeft = Callable[[], Awaitable[bool]]
T = TypeVar("T")
NUM_SELECTIONS = 3
"""Times that adapters are selected for one request, if they are changed meanwhile."""


async def _never_leaves() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class _Submission:
    """One body: its tenant, its client, and when its requests were submitted."""

    tenant: str
    has_left: HasLeft
    submitted_at: float
    """Monotonic seconds. `timeout_s` counts from here."""

    @property
    def elapsed_s(self) -> float:
        return monotonic() - self.submitted_at


@dataclass(slots=True)
class Service:
    """One served base model, with its engine, adapters and limits."""

    settings: Settings
    base_model: str
    registry: Registry
    admission: Admission
    engine: EngineThread
    metrics: Metrics
    keys: KeyRing | None = None
    """Keys of the callers; None on a server without keys, which answers anybody."""
    limiter: Limiter = field(default_factory=Limiter)
    num_ingresses: int = 0
    """Number of ingresses in front of this replica, which count the tenants' requests. 0 if this process counts them."""
    files: AdapterFiles | None = None
    """Source of adapters that come while the server runs; None if none can come."""
    required: Callable[[], Collection[str]] = tuple
    """Function that returns the references of adapters that tenants' policies need."""
    fingerprint: str = ""
    """Name of what computes answers, for replies."""
    outline: str = ""
    """Summary of the model and the capacity, for the log."""
    texts: TextThreads = field(default_factory=TextThreads)
    parse_lock: Lock = field(default_factory=Lock)
    """Lock of the one long body that is parsed."""
    parse_semaphores: TenantSemaphores = field(default_factory=lambda: TenantSemaphores(1))
    """Semaphores of a client's long bodies: at most one of each client waits for `parse_lock`."""
    bodies: Bodies = field(init=False)
    """Bytes of the request bodies under way."""
    caps: Caps = field(init=False)
    """Limits on the cost of any request. A tenant's may be lower."""
    uses: AdapterUses = field(default_factory=AdapterUses)
    rate: RateLimiter = field(init=False)
    admin: AdapterAdmin = field(init=False)
    grammar_checks: GrammarChecks = field(init=False)
    merge_admin: MergeAdmin = field(default_factory=lambda: MergeAdmin(NamedMerges()))
    selector: AdapterSelector | None = None
    """What selects the adapters of requests for `auto`; None if the base has no background."""
    base_aliases: frozenset[str] = frozenset()
    """Other names by which requests may ask for the base model. Replies never use them."""
    base_names: frozenset[str] = field(init=False)
    """All names of the base model."""
    num_requests: int = field(default=0, init=False)
    """Requests that are being admitted, wait, run, or whose answer is being sent."""
    is_draining: bool = field(default=False, init=False)
    """Whether the server is about to end. It is then not ready, and closes each connection after its answer."""

    def __post_init__(self) -> None:
        help_text = "Requests, from their first check to the last byte of their answers."
        self.metrics.watch("lori:requests_under_way", help_text, lambda: self.num_requests)
        self.base_names = self.base_aliases | {self.base_model}
        self.rate = RateLimiter(self.num_ingresses or 1)
        self.grammar_checks = GrammarChecks(self.admission)
        self.bodies = Bodies(self.settings.max_bodies_mib * MIB, max_counted_bytes(self.settings.max_body_bytes))
        self.caps = Caps(self.settings.max_request_s, self.settings.max_request_tokens)
        self.admin = AdapterAdmin(self.registry, self.uses, self.engine, self.files, lambda: self.required())

    @property
    def merges(self) -> NamedMerges:
        """The named merges."""
        return self.merge_admin.merges

    @asynccontextmanager
    async def admitted(
        self, requests: Sequence[GenerateRequest], caller: Caller, *, is_whole: bool = True, has_left: HasLeft | None = None
    ) -> AsyncGenerator[list[Request], None]:
        """Yield the caller's requests, which hold their places until the block ends. Raises errors of the error table.

        Admits all of them or none. `is_whole` says that no answer is streamed. If all places are taken, a tenant that holds none
        gets one more. Long prompts are encoded off the event loop, after the places were taken. `has_left` returns whether the
        client has disconnected: its grammars are then not checked, its prompts not weighed, and `ClientDisconnect` is raised.
        """
        submission = _Submission(caller.tenant, has_left or _never_leaves, monotonic())
        self.check_alive()
        num_answers = sum(request.sampling.num_choices for request in requests)
        self._check_possible(caller, len(requests), num_answers)
        is_first = len(requests) == 1 and not self.limiter.num_under_way(caller)
        if self.num_requests + len(requests) > self.settings.max_requests and not is_first:
            raise BusyError(
                f"{self.num_requests} requests are under way, and the limit is {self.settings.max_requests}; try again"
            )
        with ExitStack() as stack:
            stack.enter_context(self.limiter.places(caller, num_answers))
            if not self.num_ingresses:
                self.rate.count(caller, len(requests) - 1)  # the gate has counted one
            self.num_requests += len(requests)
            stack.callback(self._release, len(requests))
            caps = self.caps.lowered(caller.max_request_s, caller.max_request_tokens)
            requests = [_with_caller(caller, request, caps) for request in requests]
            requests = self.merges.resolve_all(requests)
            admitted = await self._admit(requests, caller, submission, is_whole=is_whole)
            for request in admitted:
                terms = (*request.terms, *request.policy)
                stack.enter_context(self.uses.counted(terms))
                self.metrics.count_admitted([term.name for term in terms], request.merge_names)
                if request.base_share is not None:
                    self.metrics.base_share.observe(request.base_share)
            yield admitted

    async def _admit(
        self, requests: Sequence[GenerateRequest], caller: Caller, submission: _Submission, *, is_whole: bool
    ) -> list[Request]:
        """Return the admitted requests. Requests for `auto` get the adapters that fit their prompts; all adapters are registered.

        If a selected adapter is withdrawn meanwhile, or comes into the operator's policy, adapters are selected again:
        `NUM_SELECTIONS` times, then `BusyError` is raised. Else raises as `_with_adapters` and `_admit_resolved`.
        """
        for attempt in range(NUM_SELECTIONS):
            by_name = self.registry.by_name
            resolved = await self._with_adapters(requests, submission, must_be_current=attempt > 0)
            try:
                return await self._admit_resolved(resolved, caller, submission, is_whole=is_whole)
            except (UnknownAdapterError, FaultyAdapterError):  # of a selected adapter: the client named none
                if not any(map(is_auto, requests)):
                    raise
            except (RefusedError, PolicyError):
                if not any(map(is_auto, requests)) or self.registry.by_name is by_name:
                    raise
        raise BusyError(f"the adapters selected for the prompt were changed {NUM_SELECTIONS} times in a row; try again")

    async def _admit_resolved(
        self, requests: Sequence[GenerateRequest], caller: Caller, submission: _Submission, *, is_whole: bool
    ) -> list[Request]:
        """Return the admitted requests, none of which is for `auto`, with sound grammars and with their automatic weights.

        Raises as `Admission.admit`, `GrammarChecks.check`, `_evaluate` and `check_registered`.
        """
        admitted = await self.texts.run(partial(_admit_all, self.admission, requests), submission.tenant, _size(requests))
        check_num_logprobs(admitted, is_whole=is_whole)
        # Late, because it may take long.
        grammars = (request.sampling.grammar for request in admitted)
        for grammar in dict.fromkeys(grammar for grammar in grammars if grammar):
            await self.grammar_checks.check(grammar, caller.tenant, submission.has_left)
        admitted = await self._with_weights(admitted, submission)
        self.check_alive()
        for request in admitted:
            check_registered(self.registry, request, caller.may_use)
        return [replace(request, elapsed_s=submission.elapsed_s) for request in admitted]

    async def _with_adapters(
        self, requests: Sequence[GenerateRequest], submission: _Submission, *, must_be_current: bool
    ) -> Sequence[GenerateRequest]:
        undecided = [request for request in requests if is_auto(request)]
        if not undecided:
            return requests
        selector = checked_selector(self.selector)
        prepare = partial(selector.prepare, must_be_current=must_be_current)
        pending = await self.texts.run(lambda: [*map(prepare, undecided)], submission.tenant, _size(undecided))
        queries, priority = [one.query for one in pending], undecided[0].priority or 0
        selections = await self._evaluate(queries, submission, pending[0].timeout_s, priority)
        resolved = (selector.resolve(one, selection) for one, selection in zip(pending, selections, strict=True))
        return [next(resolved) if is_auto(request) else request for request in requests]

    async def _with_weights(self, requests: list[Request], submission: _Submission) -> list[Request]:
        """Return the requests, those with automatic weights with the weights that their prompts give. Raises as `_evaluate`."""
        queries = [request.auto for request in requests if request.auto]
        if queries:
            shares = iter(await self._evaluate(queries, submission, requests[0].timeout_s, requests[0].priority))
            requests = [request.with_shares(next(shares)) if request.auto else request for request in requests]
        return requests

    async def _evaluate(
        self, queries: Sequence[PromptQuery[T]], submission: _Submission, timeout_s: float | None, priority: int
    ) -> Sequence[T]:
        """Return the results of the queries of one body's prompts, which all have the same timeout and priority.

        Raises `OutOfTimeError`, `EngineError`, and `ClientDisconnect` once the client has left: its prompts are then dropped.
        """
        time_left = None if timeout_s is None else timeout_s - submission.elapsed_s
        try:
            with fail_after(time_left), self.metrics.auto_seconds.time():
                return await self.engine.evaluate(
                    queries, priority, submission.tenant, partial(check_present, submission.has_left)
                )
        except TimeoutError as error:
            raise OutOfTimeError(f"not done within {timeout_s:g} s") from error
        except ProbeError as error:
            raise EngineError(str(error)) from error

    def _check_possible(self, caller: Caller, num_requests: int, num_answers: int) -> None:
        # Requests that could never be admitted, however often they are tried.
        limits = (self.settings.max_requests, caller.max_requests, self.rate.limit(caller))
        if num_requests > (most := min(limit for limit in limits if limit is not None)):
            raise RefusedError(
                "prompt", f"has {num_requests} texts, expected {most} at most: no more may ever be under way at once"
            )
        if caller.max_requests is not None and num_answers > caller.max_requests:
            message = (
                f"asks for {num_answers} answers, expected {caller.max_requests} at most: the tenant may have no more at once"
            )
            raise RefusedError("n", message)

    def _release(self, num_requests: int) -> None:
        self.num_requests -= num_requests

    def check_ready(self) -> None:
        """Raise `EngineDeadError` or `DrainingError` if no more requests should be sent here."""
        self.check_alive()
        if self.is_draining:
            raise DrainingError("the server is about to end")

    def check_alive(self) -> None:
        """Raise `EngineDeadError` if the engine has ended."""
        if not self.engine.is_alive:
            raise EngineDeadError("the engine is not running")

    async def generate(self, request: Request) -> AsyncGenerator[Event, None]:
        """Yield a request's events and count them. Closing it aborts the request."""
        account = Account(request, self.metrics, self.settings.log_prompts)
        if exchange := current.get():
            exchange.accounts.append(account)
        try:
            async with aclosing(self.engine.generate(request)) as events:
                async for event in events:
                    account.record(event)
                    yield event
        finally:
            account.close()


def _admit_all(admission: Admission, requests: Sequence[GenerateRequest]) -> list[Request]:
    return [admission.admit(request) for request in requests]


def _size(requests: Sequence[GenerateRequest]) -> int:
    return sum(prompt_size(request.prompt) for request in requests)


def _with_caller(caller: Caller, request: GenerateRequest, caps: Caps) -> GenerateRequest:
    # Set here, so that no route can forget the caller's rights and limits.
    priority = request.priority
    if caller.tenant:
        priority = caller.priority if priority is None else max(priority, caller.priority)
    return replace(request, tenant=caller.tenant, may_use=caller.may_use, policy=caller.policy, priority=priority, caps=caps)
