"""Runs the application on Ray Serve, on a Ray cluster that is there or on one of this process."""

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

from server.cluster.calls import Trouble, ask_each
from server.cluster.deployment import APPLICATION, REPLICA, deployed
from server.cluster.environment import StartError
from server.cluster.settings import ClusterSettings

logger = logging.getLogger(__name__)
OBJECT_STORE_BYTES = 128 << 20
"""Requests and answers do not pass through it."""
ENDING_S = 5.0
"""For Ray's processes to end by themselves."""
NOTICE_S = 1.0
"""Between two notices: a replica may have come after the first."""
POLL_S = 0.2
MARGIN_S = 30.0
"""For Ray to end the replicas, and to say so, when their requests have had their time."""
ANSWER_S = 5.0
"""For replicas to hear that they are to end."""
SILENCE = Trouble("a replica does not answer, and may have requests under way")
OURS = r"^(?:lori|server)\.[\w.]+: "
"""What Python prints before the words of an error of ours."""


@contextmanager
def serving(settings: ClusterSettings) -> Iterator[str]:
    """Serve until the block ends, and gives the address. Raises `StartError` where Ray or a replica cannot start.

    The block's end breaks what runs; `end_gently` does not.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        _connect(settings)
    except Exception as error:  # Ray's are of many kinds, and some of none
        raise StartError(f"Ray cannot be reached, or did not start: {error}") from error
    for number, handler in handlers.items():
        signal.signal(number, handler)  # Ray's own aborts
    _check_that_none_serves(settings)
    try:
        # One way in, beside the ingresses: others would have to reach these by the network, at an address that is not this one.
        serve.start(ProxyLocation.HeadOnly, HTTPOptions(host=settings.host, port=settings.port))
        _run(deployed(settings))
        yield f"http://{settings.host}:{settings.port}"
    finally:
        own = psutil.Process().children(recursive=True)
        serve.shutdown()
        ray.shutdown()
        _end(own)


async def end_gently(notice_s: float | None, drain_s: float) -> None:
    """End what is served, after a notice if there is one, in which requests are taken; they have `drain_s` after it to end."""
    if notice_s is not None:
        await _give_notice(notice_s)
    await _drain(drain_s)
    await serve.shutdown_async()  # on the loop that the notice's calls are bound to


async def _give_notice(seconds: float) -> None:
    # Every replica says at /ready that it is not, and who sends requests goes elsewhere.
    logger.info("not ready any more; requests are taken for %g s yet", seconds)
    with anyio.move_on_after(seconds):
        while True:
            await _ask_each("retire")
            await anyio.sleep(NOTICE_S)


def _run(application: Application) -> None:
    try:
        serve.run(application, name=APPLICATION, route_prefix="/")
    except RuntimeError as error:  # which says no more than that a deployment failed
        if (found := serve.status().applications.get(APPLICATION)) is None:
            raise
        failed = [of for of in found.deployments.values() if of.status.value == "DEPLOY_FAILED"]
        raise StartError("; ".join(_reason(of.message) for of in failed) or str(error)) from error


def _reason(message: str) -> str:
    """Return our own error's words at the end of a traceback, or all of it where the error is not ours."""
    return re.split(OURS, message, flags=re.MULTILINE)[-1].strip()


async def _drain(drain_s: float) -> None:
    # To delete the application first would have Ray answer 404; to shut down ends HAProxy at once, and with it every answer.
    logger.info("no request is taken any more; those under way have %g s", drain_s)
    end = anyio.current_time() + drain_s
    while any(number != 0 for number in await _ask_each("close")) and anyio.current_time() < end:
        await anyio.sleep(POLL_S)
    serve.delete(APPLICATION, _blocking=False)  # else it raises after 60 s
    while APPLICATION in serve.status().applications and anyio.current_time() < end + MARGIN_S:
        await anyio.sleep(POLL_S)


async def _ask_each(method: str) -> list[Any]:
    """Return what each replica says, None of one that does not answer: it may have requests under way."""
    try:
        said, faults = await ask_each(serve.get_deployment_handle(REPLICA, APPLICATION), method, timeout_s=ANSWER_S)
    except (RayServeException, KeyError):  # no replica is there, or not even the application, as after `serve delete`
        return []
    except Exception as error:  # noqa: BLE001  # Ray's and gRPC's: what runs is to end gently all the same
        said, faults = [], [error]
    if faults:
        SILENCE.begins(faults[0])
    return [*said, *[None for _ in faults]]


def _check_that_none_serves(settings: ClusterSettings) -> None:
    # A Ray cluster has one Serve, with one address and one end: ours would be those of others, too.
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
        address="local",  # else it would be one that another program of this machine has started
        num_cpus=settings.replica_cpus * (settings.max_replicas or settings.replicas),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=True,
    )
