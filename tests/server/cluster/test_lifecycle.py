"""A replica's requests wait until it knows of all changes, and are refused once it is to end; it always says how it is."""

import anyio
import httpx
import pytest
from starlette.responses import PlainTextResponse

from server.cluster import lifecycle
from server.cluster.lifecycle import PROBED, Lifecycle
from tests.server.live import LIMIT_S

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def replica() -> Lifecycle:
    return Lifecycle(PlainTextResponse("answered"))


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


async def test_where_the_replica_cannot_join_the_client_is_told_to_come_again(
    replica: Lifecycle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "JOIN_S", 0.01)
    async with client(replica) as http:
        reply = await http.post("/generate")
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert reply.json()["error"]["message"] == "the replica does not know yet which adapters were changed while it started"


@pytest.mark.parametrize("has_joined", [True, False])
async def test_one_that_is_to_end_refuses_at_once(replica: Lifecycle, has_joined: bool) -> None:
    replica.is_closed = True
    if has_joined:
        replica.joined.set()
    async with client(replica) as http:
        reply = await http.post("/generate")
    assert (reply.status_code, reply.json()["error"]["message"]) == (503, "the server is about to end")


@pytest.mark.parametrize("path", PROBED)
@pytest.mark.parametrize("is_closed", [True, False])
async def test_how_it_is_is_said_at_any_time(replica: Lifecycle, path: str, is_closed: bool) -> None:
    replica.is_closed = is_closed
    async with client(replica) as http:
        assert (await http.get(path)).text == "answered"
