"""The order in which Ray's router tries replicas. Fakes stand for the replicas."""

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


class FakeReplica:
    """A replica that replies with its number of requests, raises, or does not reply."""

    max_ongoing_requests = 100

    def __init__(self, name: str, reply: int | Exception | None) -> None:
        self.replica_id, self._reply = ReplicaID(unique_id=name, deployment_id=DEPLOYMENT), reply

    async def get_queue_len(self, *, deadline_s: float) -> int:  # noqa: ARG002
        if self._reply is None:
            await anyio.sleep_forever()
        if isinstance(self._reply, Exception):
            raise self._reply
        assert isinstance(self._reply, int)
        return self._reply


def router() -> AdapterRouter:
    made = AdapterRouter(DEPLOYMENT, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
    made.initialize_state(share=1.25, floor=8)
    return made


async def order(adapter_router: AdapterRouter, replicas: Sequence[RunningReplica]) -> Sequence[str]:
    request = PendingRequest(args=[], kwargs={"key": KEY}, metadata=RequestMetadata(request_id="r", internal_request_id="i"))
    return [replica.replica_id.unique_id for [replica] in await adapter_router.choose_replicas([*replicas], request)]


def replicas_of(**replies: Any) -> Sequence[RunningReplica]:
    return cast("Sequence[RunningReplica]", [FakeReplica(name, replies.get(name, 0)) for name in NAMES])


async def test_a_request_tries_the_replica_of_its_adapters_first() -> None:
    assert await order(router(), replicas_of()) == [FIRST, *OTHERS]


@pytest.mark.parametrize("reply", [None, ActorUnavailableError("cut off", None)], ids=["silent", "unreachable"])
async def test_a_replica_that_did_not_report_its_queue_is_tried_last_for_a_while(
    reply: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: Ray took such a replica for an idle one, so every request for its adapters waited for it, again and again."""
    monkeypatch.setattr(AdapterRouter, "queue_len_response_deadline_s", 0.01)
    monkeypatch.setattr(AdapterRouter, "max_queue_len_response_deadline_s", 0.01)
    adapter_router, replicas = router(), replicas_of(**{FIRST: reply})
    [first] = [replica for replica in replicas if replica.replica_id.unique_id == FIRST]
    with anyio.fail_after(LIMIT_S):
        assert await adapter_router._select_from_candidate_replicas([first], 0) is None
    assert await order(adapter_router, replicas) == [*OTHERS, FIRST]
    monkeypatch.setattr(router_module, "AVOIDED_S", 0.0)
    assert await order(adapter_router, replicas) == [FIRST, *OTHERS]


async def test_a_replica_whose_requests_failed_is_tried_last_for_a_while() -> None:
    adapter_router, replicas = router(), replicas_of()
    [first] = [replica for replica in replicas if replica.replica_id.unique_id == FIRST]
    adapter_router.on_replica_actor_unavailable(first.replica_id)
    assert await order(adapter_router, replicas) == [*OTHERS, FIRST]
