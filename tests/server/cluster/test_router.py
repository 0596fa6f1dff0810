"""Ray's router, as it asks for the order of replicas; fakes stand for these."""

from collections.abc import Sequence
from typing import Any, cast

import anyio
import pytest
from ray.exceptions import ActorUnavailableError
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest, RunningReplica

from server.affinity import ranked
from server.cluster import router as router_module
from server.cluster.router import AdapterRouter
from tests.server.live import LIMIT_S

pytestmark = pytest.mark.anyio
DEPLOYMENT = DeploymentID(name="Replica", app_name="lori-server")
NAMES = ("a", "b", "c")
KEY = "math"
FIRST, *OTHERS = ranked(KEY, NAMES)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class FakeReplica:
    """A replica that says how many requests it has, or raises, or says nothing."""

    max_ongoing_requests = 100

    def __init__(self, name: str, said: int | Exception | None) -> None:
        self.replica_id, self._said = ReplicaID(unique_id=name, deployment_id=DEPLOYMENT), said

    async def get_queue_len(self, *, deadline_s: float) -> int:  # noqa: ARG002
        if self._said is None:
            await anyio.sleep_forever()
        if isinstance(self._said, Exception):
            raise self._said
        assert isinstance(self._said, int)
        return self._said


def router() -> AdapterRouter:
    made = AdapterRouter(DEPLOYMENT, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
    made.initialize_state(share=1.25, floor=8)
    return made


async def order(of: AdapterRouter, replicas: Sequence[RunningReplica]) -> Sequence[str]:
    request = PendingRequest(args=[], kwargs={"key": KEY}, metadata=RequestMetadata(request_id="r", internal_request_id="i"))
    return [replica.replica_id.unique_id for [replica] in await of.choose_replicas([*replicas], request)]


def replicas_of(**said: Any) -> Sequence[RunningReplica]:
    return cast("Sequence[RunningReplica]", [FakeReplica(name, said.get(name, 0)) for name in NAMES])


async def test_a_request_tries_the_replica_of_its_adapters_first() -> None:
    assert await order(router(), replicas_of()) == [FIRST, *OTHERS]


@pytest.mark.parametrize("said", [None, ActorUnavailableError("cut off", None)], ids=["silent", "unreachable"])
async def test_one_that_could_not_say_what_it_has_is_tried_last_for_a_while(
    said: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray took it for one that has nothing to do: every request for its adapters waited for it, again and again."""
    monkeypatch.setattr(AdapterRouter, "queue_len_response_deadline_s", 0.01)
    monkeypatch.setattr(AdapterRouter, "max_queue_len_response_deadline_s", 0.01)
    of, replicas = router(), replicas_of(**{FIRST: said})
    [first] = [replica for replica in replicas if replica.replica_id.unique_id == FIRST]
    with anyio.fail_after(LIMIT_S):
        assert await of._select_from_candidate_replicas([first], 0) is None
    assert await order(of, replicas) == [*OTHERS, FIRST]
    monkeypatch.setattr(router_module, "AVOIDED_S", 0.0)
    assert await order(of, replicas) == [FIRST, *OTHERS]


async def test_one_whose_requests_failed_is_tried_last_for_a_while() -> None:
    of, replicas = router(), replicas_of()
    [first] = [replica for replica in replicas if replica.replica_id.unique_id == FIRST]
    of.on_replica_actor_unavailable(first.replica_id)
    assert await order(of, replicas) == [*OTHERS, FIRST]
