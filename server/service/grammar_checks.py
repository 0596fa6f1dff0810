"""Checks of requests' grammars, one at a time, so that one client's slow grammars delay the others little."""

from collections.abc import Awaitable, Callable

from anyio import Lock
from anyio.to_thread import run_sync
from starlette.requests import ClientDisconnect

from server.access.limits import TenantPlaces
from server.engine.admission import Admission
from server.engine.grammar import CrowdedError, Grammar

MAX_PER_TENANT = 8
"""Grammars of one tenant that are checked or wait for a check. Clients without a key are no tenant and have no such limit."""


class GrammarChecks:
    """Queue of grammar checks: one runs at a time, first come, first served. Use from the event loop alone.

    Each grammar first gets a short trial. One that takes longer moves to a second queue, so a usual grammar of another client
    waits only for the short trials before it.
    """

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._places = TenantPlaces()
        self._quick_lock, self._slow_lock = Lock(), Lock()

    async def check(self, grammar: Grammar, tenant: str, has_left: Callable[[], Awaitable[bool]]) -> None:
        """Check that an answer can follow the grammar of an admitted request.

        Returns at once for a grammar that was checked before. `has_left` is called before each check: nothing is checked for a
        client that has disconnected. Raises `RefusedError`, `ClientDisconnect`, or `CrowdedError` if the tenant has
        `MAX_PER_TENANT` grammars in here.
        """
        if self._admission.knows_grammar(grammar):
            return
        if tenant and self._places.num_held(tenant) >= MAX_PER_TENANT:
            raise CrowdedError(
                f"{MAX_PER_TENANT} grammars of tenant {tenant!r} are being compiled, which is the limit; try again"
            )
        with self._places.place(tenant):
            async with self._quick_lock:
                await check_present(has_left)
                if await run_sync(lambda: self._admission.check_grammar(grammar, is_quick=True)):
                    return
            async with self._slow_lock:
                await check_present(has_left)
                await run_sync(lambda: self._admission.check_grammar(grammar))


async def check_present(has_left: Callable[[], Awaitable[bool]]) -> None:
    """Raise `ClientDisconnect` if the client has disconnected."""
    if await has_left():
        raise ClientDisconnect
