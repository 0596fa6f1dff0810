"""The application on Ray Serve: ingresses that accept requests, and replicas that answer them. Runs nothing itself."""

import sys
from collections.abc import Callable
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp
from uvicorn.lifespan.on import LifespanOn

from lori.names import EMBEDDED_NAME, short_name
from server.access.key_ring import KeyRing
from server.cluster.handles import ReplicaHandles
from server.cluster.ingress import Ingress
from server.cluster.replica import Replica
from server.cluster.router import AdapterRouter
from server.cluster.settings import ClusterSettings
from server.telemetry.logs import configure_log
from server.transport.http_protocol import make_default_protocol

APPLICATION, REPLICA = "lori-server", "Replica"
SPARE_REQUESTS = 64
"""Requests that a replica gets beside those that it admits: it refuses these itself, and answers probes."""
QUIET = LoggingConfig(enable_access_log=False)
"""No access log: the replicas log their requests themselves."""
HEALTH_CHECK_S = 1.0
HEALTH_TIMEOUT_S = 30.0
"""A replica that computes a long step on a busy machine is not dead."""

ON_HEAD = {"node:__internal_head__": 0.001}
"""Resource of Ray's head node. Ingresses run there, beside HAProxy: without the head the cluster ends anyway, so the loss of
another machine only cuts off replicas."""

KEEPALIVE_ENVIRONMENT = {"RAY_grpc_client_keepalive_timeout_ms": "10000"}
"""Environment of an ingress: it ends a connection whose bytes the other machine has not acknowledged for so long.

`ReplicaHandles.watch` sends such bytes. Elsewhere Ray's 120 s remain: otherwise Ray would replace a replica that was cut off for
a moment. More of keepalive's own pings would end good connections, because a server that is silent for minutes takes them for
abuse."""
REPLICA_KEEPALIVE_ENVIRONMENT = {"RAY_grpc_keepalive_timeout_ms": "120000"}
"""Environment of a replica: it keeps a connection whose bytes are not acknowledged for so long, as Ray's clients do.

Ray's servers give up after 20 s. The kernel sends unacknowledged bytes again at growing intervals, so that a machine that was cut
off for 17 s could be heard too late: the replica had closed its connection to Ray's controller, which replaced it."""
CLUSTER_SETTINGS = ("host", "port", "ray_address")
"""Settings of the cluster, which `args` of an application in a Serve config file cannot have."""
LONGEST_LOOK_BACK_S = 30.0
"""Ray averages the requests under way over so many seconds, or over the delay if that is shorter."""


def deployed(settings: ClusterSettings) -> Application:
    """Return the application, for `serve.run` or `serve deploy`."""
    replica = serve.deployment(
        name=REPLICA,
        max_ongoing_requests=settings.max_requests + SPARE_REQUESTS,
        ray_actor_options={
            "num_cpus": settings.replica_cpus,
            "num_gpus": settings.replica_gpus,
            "runtime_env": {"env_vars": REPLICA_KEEPALIVE_ENVIRONMENT},
        },
        graceful_shutdown_timeout_s=settings.drain_s,
        logging_config=QUIET,
        health_check_period_s=HEALTH_CHECK_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        request_router_config=RequestRouterConfig.model_validate(
            {
                "request_router_class": AdapterRouter,
                "request_router_kwargs": {"share": settings.affinity_share, "floor": settings.affinity_floor},
            }
        ),
        num_replicas=None if settings.max_replicas else settings.replicas,
        autoscaling_config=_autoscaling(settings),
    )(Replica)
    ingress = serve.deployment(
        name="Ingress",
        num_replicas=settings.ingresses,
        max_ongoing_requests=2**16,  # the replicas refuse when it is too much
        ray_actor_options={"num_cpus": 0, "resources": ON_HEAD, "runtime_env": {"env_vars": KEEPALIVE_ENVIRONMENT}},
        graceful_shutdown_timeout_s=settings.drain_s,
        logging_config=QUIET,
    )(serve.ingress(_ingress_factory(settings))(_IngressDeployment))
    return ingress.bind(replica.bind(settings.replica_settings, settings.ingresses))


def from_config(options: dict[str, Any]) -> Application:
    """Return the application for a Serve config file, whose `args` are the flags by their names in Python: `replicas: 2`.

    Raises `ValueError` if one is wrong, or is a setting of the cluster.
    """
    if outside := [name for name in CLUSTER_SETTINGS if name in options]:
        raise ValueError(f"args: {', '.join(outside)}: the file's http_options, and the cluster that it is deployed to, say that")
    return deployed(ClusterSettings(**options))


class _IngressDeployment:
    """The class that Ray requires beside an ASGI application. Its argument makes the replicas start first."""

    def __init__(self, replicas: DeploymentHandle[Replica]) -> None:
        """Accept the handle of the replicas."""

    def check_health(self) -> None:
        """Raise if a background task of the ingress, such as the watch of the key file, has died: Ray then replaces it."""
        lifespan: LifespanOn = self._serve_asgi_lifespan  # type: ignore[attr-defined]  # `serve.ingress` adds it
        if lifespan.error_occurred:
            raise RuntimeError("a task of the ingress died; its log says why")


def _ingress_factory(settings: ClusterSettings) -> Callable[[], ASGIApp]:
    def build() -> ASGIApp:
        # Runs in the ingress's own process, before Ray starts uvicorn there.
        make_default_protocol()
        configure_log(settings.log_format, sys.__stderr__)
        keys = KeyRing(settings.keys) if settings.keys else None
        base_model = short_name(settings.model) if settings.model else EMBEDDED_NAME
        return Ingress(ReplicaHandles(serve.get_deployment_handle(REPLICA)), keys, settings, base_model, settings.ingresses)

    return build


def _autoscaling(settings: ClusterSettings) -> AutoscalingConfig | None:
    if settings.max_replicas is None:
        return None
    return AutoscalingConfig(
        min_replicas=settings.replicas,
        max_replicas=settings.max_replicas,
        target_ongoing_requests=settings.target_requests,
        upscale_delay_s=settings.upscale_delay_s,
        downscale_delay_s=settings.downscale_delay_s,
        look_back_period_s=min(LONGEST_LOOK_BACK_S, max(1.0, settings.upscale_delay_s)),
    )
