"""The application on Ray Serve, on an existing Ray cluster or on one that this process starts."""

import logging
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import anyio
import psutil
import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.exceptions import RayServeException

from server.cluster.calls import FaultLog, ask_each
from server.cluster.deployment import APPLICATION, REPLICA, deployed
from server.cluster.environment import StartError
from server.cluster.settings import ClusterSettings

logger = logging.getLogger(__name__)
OBJECT_STORE_BYTES = 128 << 20
"""Small, because requests and answers do not pass through the object store."""
ENDING_S = 5.0
"""Seconds for Ray's processes to end by themselves."""
NOTICE_S = 1.0
"""Seconds between two notices: a replica may have come after the first."""
POLL_S = 0.2
MARGIN_S = 30.0
"""Seconds for Ray to end the replicas, and to report it, after the requests' time."""
ANSWER_S = 5.0
"""Seconds for replicas to confirm that they are to end."""
SILENT_REPLICAS = FaultLog("a replica does not answer, and may have requests under way")
ERROR_PREFIX = r"^(?:lori|server)\.[\w.]+: "
"""Python's prefix before the message of one of this project's errors."""


@contextmanager
def serving(settings: ClusterSettings) -> Iterator[str]:
    """Serve until the block ends, and yield the address. Raises `StartError` if Ray or a replica cannot start.

    The end of the block aborts running requests; `end_gently` does not.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        _connect(settings)
    except Exception as error:  # Ray's are of many kinds, and some have no class of their own
        raise StartError(f"Ray cannot be reached, or did not start: {error}") from error
    for number, handler in handlers.items():
        signal.signal(number, handler)  # Ray's own handler aborts
    _check_that_none_serves(settings)
    try:
        # Only one entry, beside the ingresses: other proxies would have to reach these over the network, at an address that they
        # do not listen on.
        serve.start(ProxyLocation.HeadOnly, HTTPOptions(host=settings.host, port=settings.port))
        _run(deployed(settings))
        yield f"http://{settings.host}:{settings.port}"
    finally:
        children = psutil.Process().children(recursive=True)
        serve.shutdown()
        ray.shutdown()
        _end(children)


async def end_gently(notice_s: float | None, drain_s: float) -> None:
    """End the application. During the notice, if any, requests are accepted; after it, running ones have `drain_s` to end."""
    if notice_s is not None:
        await _give_notice(notice_s)
    await _drain(drain_s)
    await serve.shutdown_async()  # on the event loop that the notice's calls are bound to


async def _give_notice(seconds: float) -> None:
    # Every replica answers 503 at /ready, so that clients and load balancers go elsewhere.
    logger.info("not ready any more; requests are taken for %g s yet", seconds)
    with anyio.move_on_after(seconds):
        while True:
            await _ask_each("retire")
            await anyio.sleep(NOTICE_S)


def _run(application: Application) -> None:
    try:
        serve.run(application, name=APPLICATION, route_prefix="/")
    except RuntimeError as error:  # which only says that a deployment failed
        if (status := serve.status().applications.get(APPLICATION)) is None:
            raise
        failed = [deployment for deployment in status.deployments.values() if deployment.status.value == "DEPLOY_FAILED"]
        raise StartError("; ".join(_reason(deployment.message) for deployment in failed) or str(error)) from error


def _reason(message: str) -> str:
    """Return the message of this project's error at the end of a traceback, or all of the text if it is another error."""
    return re.split(ERROR_PREFIX, message, flags=re.MULTILINE)[-1].strip()


async def _drain(drain_s: float) -> None:
    # Deleting the application first would make Ray answer 404. A shutdown ends HAProxy at once, and with it every answer.
    logger.info("no request is taken any more; those under way have %g s", drain_s)
    end = anyio.current_time() + drain_s
    while any(number != 0 for number in await _ask_each("close")) and anyio.current_time() < end:
        await anyio.sleep(POLL_S)
    serve.delete(APPLICATION, _blocking=False)  # otherwise it raises after 60 s
    while APPLICATION in serve.status().applications and anyio.current_time() < end + MARGIN_S:
        await anyio.sleep(POLL_S)


async def _ask_each(method: str) -> list[Any]:
    """Return the reply of each replica; None for one that does not answer, which may have requests under way."""
    try:
        replies, faults = await ask_each(serve.get_deployment_handle(REPLICA, APPLICATION), method, timeout_s=ANSWER_S)
    except (RayServeException, KeyError):  # no replica is there, or not even the application, as after `serve delete`
        return []
    except Exception as error:  # noqa: BLE001  # Ray's and gRPC's: running requests must end gently all the same
        replies, faults = [], [error]
    if faults:
        SILENT_REPLICAS.report(faults[0])
    return [*replies, *[None for _ in faults]]


def _check_that_none_serves(settings: ClusterSettings) -> None:
    # A Ray cluster has one Serve, with one address and one end, which this application would share with others.
    status = serve.status()
    if settings.ray_address and (status.proxies or status.applications):
        ray.shutdown()
        raise StartError(
            f"Ray Serve runs already on the Ray at {settings.ray_address}, where this would take its address and end it: "
            "`serve deploy` puts docker/serve.yaml there, and `serve shutdown` ends what runs"
        )


def _end(processes: Sequence[psutil.Process]) -> None:
    # Ray can leave HAProxy behind, which would keep the port.
    _, left = psutil.wait_procs(processes, timeout=ENDING_S)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _connect(settings: ClusterSettings) -> None:
    if settings.ray_address:
        ray.init(address=settings.ray_address)
        return
    ray.init(
        address="local",  # otherwise it could be one that another program on this machine has started
        num_cpus=settings.replica_cpus * (settings.max_replicas or settings.replicas),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=True,
    )
