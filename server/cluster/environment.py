"""Environment variables for Ray Serve, which reads them at import: they are set before that, for all its processes."""

import math
import os
import sysconfig
from pathlib import Path

from server.settings import Settings
from server.transport.sockets import free_port


class StartError(Exception):
    """Ray, a replica or an ingress cannot start. The message has the reason."""


CLIENT_TIMEOUT = "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"


def client_timeout(settings: Settings) -> str:
    """Return HAProxy's limit on a client that has to send or to read, in seconds.

    Nothing else would end a client that sends no headers. HAProxy has one limit for headers, bodies and reads. The time in which
    a client waits for the server does not count.
    """
    return str(math.ceil(max(settings.keep_alive_s, settings.max_body_s, settings.max_unread_s)))


MAX_CONNECTIONS = "RAY_SERVE_HAPROXY_MAXCONN"

PREFERRED = {
    # Requests go through HAProxy to the ingress, and on by gRPC: 2 ms instead of 10.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # A busy machine takes more than the default 5 s to start a proxy.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    # With Ray's default of 15, all other processes on the machine take precedence over its replicas: a start takes minutes.
    "RAY_worker_niceness": "0",
    # Otherwise served on all addresses of the machine, without a key.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Otherwise Ray logs only one in five seconds of lines that differ in numbers alone. And with its coloured prefix no line is
    # JSON; a replica's lines name it themselves.
    "RAY_DEDUP_LOGS": "0",
    "RAY_DISABLE_WORKER_LOG_PREFIX": "1",
    # Ray gives a load balancer that is not its own 30 s to notice that an ingress goes. HAProxy is notified.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
    # With gRPC's 4 MiB no longer message would pass between an ingress and a replica: no upload, list or answer. The flags limit
    # the bodies; this is the maximum.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
    # The interval at which an ingress reports its requests under way, by which Ray scales the replicas. With Ray's 10 s a delay
    # of 5 s would have no effect.
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",
    # With Ray's 3600 s a few thousand connections that send nothing would keep all others out for an hour.
    CLIENT_TIMEOUT: client_timeout(Settings.model_construct()),
    # One more waits until another ends: HAProxy sends no answer.
    MAX_CONNECTIONS: str(Settings.model_construct().max_connections),
}
"""Values that hold unless the operator sets others."""
HAPROXY, HAPROXY_PROGRAM = "RAY_SERVE_HAPROXY_BINARY_PATH", "lori-server-haproxy"
PORTS = ("RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT")
"""Ports that Ray listens on in any case. With Ray's own choice, a second cluster on the machine could not start."""


def prepare_environment(settings: Settings) -> None:
    """Set the variables that are not set yet. Call it before anything of Ray is imported.

    Raises `StartError` if the program that makes Ray's HAProxy safe is missing: Ray would start HAProxy without it.
    """
    from_settings = {CLIENT_TIMEOUT: client_timeout(settings), MAX_CONNECTIONS: str(settings.max_connections)}
    for name, value in (PREFERRED | from_settings).items():
        os.environ.setdefault(name, value)
    haproxy = Path(sysconfig.get_path("scripts"), HAPROXY_PROGRAM)
    if HAPROXY not in os.environ and not haproxy.is_file():
        raise StartError(f"{haproxy} is missing, without which one client can get another's answer: install the package")
    os.environ.setdefault(HAPROXY, str(haproxy))
    for name in PORTS:
        os.environ.setdefault(name, str(free_port()))
