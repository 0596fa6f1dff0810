"""Checks of the grammars that requests bring: in turns, so that one client's slow grammars cost the others little."""

from collections.abc import Awaitable, Callable

from anyio import Lock
from anyio.to_thread import run_sync
from starlette.requests import ClientDisconnect

from server.access.limits import TenantPlaces
from server.engine.admission import Admission
from server.engine.grammar import CrowdedError, Grammar

MAX_PER_TENANT = 8
"""Grammars of one tenant that are checked or wait for it. Clients without a key are no tenant, and have no such limit."""


class GrammarChecks:
    """Checks one grammar at a time, first come, first served; use from the event loop alone.

    Those that take long wait in a line of their own once that is seen: another client's usual grammar waits for a short trial of
    each that came before it.
    """

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._places = TenantPlaces()
        self._first, self._slow = Lock(), Lock()

    async def check(self, grammar: Grammar, tenant: str, has_left: Callable[[], Awaitable[bool]]) -> None:
        """Make sure that an answer can follow the grammar of an admitted request; one that was checked before waits for nothing.

        `has_left` is asked when its turn comes: nothing is checked for a client that has left. Raises `RefusedError`,
        `ClientDisconnect`, or `CrowdedError` where the tenant has as many as it may have in here.
        """
        if self._admission.knows_grammar(grammar):
            return
        if tenant and self._places.num_held(tenant) >= MAX_PER_TENANT:
            raise CrowdedError(
                f"{MAX_PER_TENANT} grammars of tenant {tenant!r} are being compiled, which is the limit; try again"
            )
        with self._places.place(tenant):
            async with self._first:
                await _check_present(has_left)
                if await run_sync(lambda: self._admission.check_grammar(grammar, is_quick=True)):
                    return
            async with self._slow:
                await _check_present(has_left)
                await run_sync(lambda: self._admission.check_grammar(grammar))


async def _check_present(has_left: Callable[[], Awaitable[bool]]) -> None:
    if await has_left():
        raise ClientDisconnect
