"""The life of a replica: requests wait until it knows of all changes, and are refused once it is to end; probes never are."""

import anyio
import httpx
import pytest
from starlette.responses import PlainTextResponse

from server.cluster import lifecycle
from server.cluster.lifecycle import PROBED, Lifecycle
from tests.server.live import LIMIT_S

pytestmark = pytest.mark.anyio
MAX_WAITING = 2


@pytest.fixture
def replica() -> Lifecycle:
    return Lifecycle(PlainTextResponse("answered"), MAX_WAITING)


def client(replica: Lifecycle) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(replica), base_url="http://replica")


async def test_a_request_waits_until_its_replica_has_joined(replica: Lifecycle) -> None:
    texts: list[str] = []

    async def ask() -> None:
        texts.append((await http.post("/generate")).text)

    with anyio.fail_after(LIMIT_S):
        async with client(replica) as http, anyio.create_task_group() as group:
            group.start_soon(ask)
            await anyio.wait_all_tasks_blocked()
            assert texts == []
            replica.joined.set()
    assert texts == ["answered"]


async def test_a_client_is_asked_to_retry_if_the_replica_cannot_join(replica: Lifecycle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "JOIN_S", 0.01)
    async with client(replica) as http:
        reply = await http.post("/generate")
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert reply.json()["error"]["message"] == "the replica does not know yet which adapters were changed while it started"


async def test_waiting_requests_leave_room_for_the_call_that_lets_the_replica_join(replica: Lifecycle) -> None:
    """Regression: waiting requests took all of Ray's places, so no join could arrive until the first had waited ten seconds."""
    statuses: list[int] = []

    async def ask() -> None:
        statuses.append((await http.post("/generate")).status_code)

    with anyio.fail_after(LIMIT_S):
        async with client(replica) as http:
            for _ in range(2):  # requests that were cancelled no longer count as waiting
                async with anyio.create_task_group() as group:
                    for _ in range(MAX_WAITING + 1):
                        group.start_soon(ask)
                    await anyio.wait_all_tasks_blocked()
                    assert statuses == [503]
                    statuses.clear()
                    group.cancel_scope.cancel()
            async with anyio.create_task_group() as group:
                for _ in range(MAX_WAITING):
                    group.start_soon(ask)
                await anyio.wait_all_tasks_blocked()
                replica.joined.set()
    assert statuses == [200] * MAX_WAITING


@pytest.mark.parametrize("has_joined", [True, False])
async def test_a_replica_that_is_to_end_refuses_at_once(replica: Lifecycle, has_joined: bool) -> None:
    replica.is_closed = True
    if has_joined:
        replica.joined.set()
    async with client(replica) as http:
        reply = await http.post("/generate")
    assert (reply.status_code, reply.json()["error"]["message"]) == (503, "the server is about to end")


@pytest.mark.parametrize("path", PROBED)
@pytest.mark.parametrize("is_closed", [True, False])
async def test_probes_are_answered_at_any_time(replica: Lifecycle, path: str, is_closed: bool) -> None:
    replica.is_closed = is_closed
    async with client(replica) as http:
        assert (await http.get(path)).text == "answered"
