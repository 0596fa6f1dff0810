"""The end of a cluster, which lets running requests end first. Fakes stand for Ray Serve."""

from collections.abc import Sequence
from types import SimpleNamespace

import anyio
import grpc
import pytest
from ray.exceptions import ActorUnavailableError
from ray.serve.exceptions import DeploymentUnavailableError

from server.cluster import serving
from server.cluster.deployment import APPLICATION, REPLICA
from tests.server.cluster.fake_calls import FakeCall, FakeResult
from tests.server.live import LIMIT_S

pytestmark = pytest.mark.anyio
SILENT = FakeResult(None, is_silent=True)
BROKEN = FakeResult(grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), grpc.aio.Metadata(), "a broken frame"))
DEAD = FakeResult(ActorUnavailableError("cut off", b"0" * 16))


class FakeServe:
    """Ray Serve with one application. Its replicas answer the n-th call of `close` with the n-th of `rounds`."""

    def __init__(self, rounds: Sequence[Sequence[FakeResult]]) -> None:
        self._rounds, self.is_deleted = list(rounds), False
        self.calls: list[str] = []

    def get_deployment_handle(self, deployment: str, application: str) -> "FakeServe":
        assert (deployment, application) == (REPLICA, APPLICATION)
        if self.is_deleted:
            raise KeyError("it does not exist")
        return self

    def broadcast(self, method: str) -> FakeCall:
        self.calls.append(method)
        if method == "retire":
            return FakeCall([FakeResult(None)])
        if not self._rounds:
            raise DeploymentUnavailableError("none")
        return FakeCall(self._rounds.pop(0))

    def delete(self, application: str, _blocking: bool) -> None:
        assert application == APPLICATION
        assert not _blocking
        self.calls.append("delete")

    def status(self) -> SimpleNamespace:
        return SimpleNamespace(applications={})

    async def shutdown_async(self) -> None:
        self.calls.append("shutdown")


@pytest.mark.parametrize(
    ("rounds", "num_rounds"),
    [
        ([[FakeResult(2), SILENT], [FakeResult(1), SILENT], [FakeResult(0), FakeResult(0)]], 3),
        ([[SILENT, FakeResult(0)], [BROKEN], [FakeResult(0), DEAD], [FakeResult(1)]], 3),
        ([[FakeResult(1)]], 2),  # then no replica is left
    ],
)
async def test_a_cluster_ends_when_each_replica_has_nothing_under_way(
    rounds: Sequence[Sequence[FakeResult]], num_rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: one replica that did not answer made all seem idle, and running requests were broken off."""
    fake = FakeServe(rounds)
    monkeypatch.setattr(serving, "serve", fake)
    monkeypatch.setattr(serving, "ANSWER_S", 0.01)
    monkeypatch.setattr(serving, "POLL_S", 0)
    with anyio.fail_after(LIMIT_S):
        await serving.end_gently(None, 600)
    assert fake.calls == [*["close"] * num_rounds, "delete", "shutdown"]


async def test_a_deleted_application_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeServe([])
    fake.is_deleted = True
    monkeypatch.setattr(serving, "serve", fake)
    with anyio.fail_after(LIMIT_S):
        await serving.end_gently(None, 600)
    assert fake.calls == ["delete", "shutdown"]


async def test_requests_that_take_too_long_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeServe([[FakeResult(1)]] * 1000)
    monkeypatch.setattr(serving, "serve", fake)
    with anyio.fail_after(LIMIT_S):
        await serving.end_gently(None, 0)
    assert fake.calls == ["close", "delete", "shutdown"]


async def test_a_notice_is_repeated_for_replicas_that_come_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeServe([])
    monkeypatch.setattr(serving, "serve", fake)
    monkeypatch.setattr(serving, "NOTICE_S", 0)

    async def end() -> None:
        await serving.end_gently(3600, 600)

    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as group:
            group.start_soon(end)
            while len(fake.calls) < 3:
                await anyio.sleep(0)
            group.cancel_scope.cancel()
    assert set(fake.calls) == {"retire"}
