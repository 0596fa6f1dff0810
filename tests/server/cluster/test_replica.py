"""Health checks of replicas and ingresses. If a check raises, Ray starts another process in its place."""

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest
from transformers import PreTrainedTokenizerFast

from server.cluster.deployment import _IngressDeployment
from server.cluster.replica import Replica
from server.engine.thread import EngineDeadError
from tests.server.keyed import make_service
from tests.server.live import LIMIT_S
from tests.server.rig import FakeEngine, request


def test_a_replica_whose_engine_died_is_not_healthy(tokenizer: PreTrainedTokenizerFast) -> None:
    service = make_service(tokenizer, engine=FakeEngine(dies_at=1))
    replica = cast(Replica, SimpleNamespace(_service=service, _running=SimpleNamespace(check=lambda: None)))

    async def live() -> None:
        service.engine.start()
        Replica.check_health(replica)
        async for _ in service.engine.generate(request()):
            pass
        with pytest.raises(EngineDeadError):
            Replica.check_health(replica)

    asyncio.run(asyncio.wait_for(live(), LIMIT_S))


def test_a_replica_whose_tasks_died_is_not_healthy(tokenizer: PreTrainedTokenizerFast) -> None:
    service = make_service(tokenizer)
    service.engine.is_alive = True

    def fail() -> None:
        raise ValueError("no")

    replica = cast(Replica, SimpleNamespace(_service=service, _running=SimpleNamespace(check=fail)))
    with pytest.raises(ValueError, match="no"):
        Replica.check_health(replica)


def test_an_ingress_whose_tasks_died_is_not_healthy() -> None:
    lifespan = SimpleNamespace(error_occurred=False)
    ingress = cast(_IngressDeployment, SimpleNamespace(_serve_asgi_lifespan=lifespan))
    _IngressDeployment.check_health(ingress)
    lifespan.error_occurred = True
    with pytest.raises(RuntimeError, match="a task of the ingress died"):
        _IngressDeployment.check_health(ingress)
