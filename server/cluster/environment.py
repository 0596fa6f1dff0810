"""Environment variables for Ray Serve, which reads them when it is imported: set before that, in all its processes."""

import math
import os
import sysconfig
from pathlib import Path

from server.settings import Settings
from server.transport.sockets import free_port


class StartError(Exception):
    """Ray, a replica or an ingress cannot start, and why."""


CLIENT_TIMEOUT = "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"


def client_timeout(settings: Settings) -> str:
    """Return how long HAProxy waits for a client that has to send or to read, in seconds: for a head, nothing else would end it.

    It has one limit for all. What a client waits for does not count.
    """
    return str(math.ceil(max(settings.keep_alive_s, settings.max_body_s, settings.max_unread_s)))


MAX_CONNECTIONS = "RAY_SERVE_HAPROXY_MAXCONN"

PREFERRED = {
    # Requests go through HAProxy to the ingress, and on by gRPC: 2 ms instead of 10.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # A busy machine takes more than the usual 5 s to start a proxy.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    # With Ray's 15 whatever else computes on the machine goes before its replicas, a start of minutes included.
    "RAY_worker_niceness": "0",
    # On all addresses of the machine, and without a key.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Else Ray logs one in five seconds of requests whose lines differ in numbers alone; and with its coloured prefix no line is
    # JSON. A replica's lines name it themselves.
    "RAY_DEDUP_LOGS": "0",
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",
    # Ray lets a load balancer that is not its own have 30 s to hear that an ingress goes. HAProxy is told.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
    # With gRPC's 4 MiB nothing longer would pass between an ingress and a replica: no upload, list or answer. The flags say how
    # long a body may be; this is as much as there can be.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
    # How often an ingress says how many requests are under way, which is what replicas come and go by: with Ray's 10 s a delay of
    # 5 s would be none.
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",
    # With Ray's 3600 s some thousand connections that send nothing would keep all others out for an hour.
    CLIENT_TIMEOUT: client_timeout(Settings.model_construct()),
    # One more waits until another ends: HAProxy answers nothing.
    MAX_CONNECTIONS: str(Settings.model_construct().max_connections),
}
"""What holds where the operator says nothing else."""
HAPROXY, HAPROXY_PROGRAM = "RAY_SERVE_HAPROXY_BINARY_PATH", "lori-server-haproxy"
PORTS = ("RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT")
"""That are listened on, asked for or not: at Ray's own choice a second cluster on the machine could not start."""


def prepare_environment(settings: Settings) -> None:
    """Set what is not set yet. To be called before anything of Ray is imported.

    Raises `StartError` where the program is missing that makes Ray's HAProxy safe: Ray would start it as it is.
    """
    own = {CLIENT_TIMEOUT: client_timeout(settings), MAX_CONNECTIONS: str(settings.max_connections)}
    for name, value in (PREFERRED | own).items():
        os.environ.setdefault(name, value)
    haproxy = Path(sysconfig.get_path("scripts"), HAPROXY_PROGRAM)
    if HAPROXY not in os.environ and not haproxy.is_file():
        raise StartError(f"{haproxy} is missing, without which one client can get another's answer: install the package")
    os.environ.setdefault(HAPROXY, str(haproxy))
    for name in PORTS:
        os.environ.setdefault(name, str(free_port()))
