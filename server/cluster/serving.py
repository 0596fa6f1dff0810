"""Runs the application on Ray Serve, on a Ray cluster that is there or on one of this process."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import psutil
import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation

from server.cluster.deployment import APPLICATION, deployed
from server.cluster.settings import ClusterSettings

logger = logging.getLogger(__name__)
OBJECT_STORE_BYTES = 128 << 20
"""Requests and answers do not pass through it."""
ENDING_S = 5.0
"""For Ray's processes to end by themselves."""


class StartError(Exception):
    """Ray or the replicas did not start; the log has what they said."""


@contextmanager
def serving(settings: ClusterSettings) -> Iterator[str]:
    """Serves until the block ends, and gives the address. Raises `StartError` where Ray or a replica cannot start."""
    try:
        _connect(settings)
    except Exception as error:  # Ray's are of many kinds, and some of none
        raise StartError(f"Ray cannot be reached, or did not start: {error}") from error
    try:
        # One way in, beside the ingresses: others would have to reach these by the network, at an address that is not this one.
        serve.start(ProxyLocation.HeadOnly, HTTPOptions(host=settings.host, port=settings.port))
        try:
            serve.run(deployed(settings), name=APPLICATION, route_prefix="/")
        except RuntimeError as error:  # Ray has no other for it
            raise StartError(f"the cluster did not start, and what its replicas said is above: {error}") from error
        yield f"http://{settings.host}:{settings.port}"
    finally:
        logger.info("requests under way have %g s", settings.drain_s)
        own = psutil.Process().children(recursive=True)
        serve.shutdown()
        ray.shutdown()
        _end(own)


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
