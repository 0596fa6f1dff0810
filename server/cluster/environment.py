"""What Ray Serve is told by environment variables, which it reads when it is imported: in all its processes, and before that."""

import os

from server.transport.ports import free_port

PREFERRED = {
    # Requests go through HAProxy to the ingress, and on by gRPC: 2 ms instead of 10.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # A busy machine takes more than the usual 5 s to start a proxy.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    # On all addresses of the machine, and without a key.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""What holds where the operator says nothing else."""
PORTS = ("RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_HAPROXY_METRICS_PORT")
"""That HAProxy listens on, asked for or not: at Ray's own choice a second cluster on the machine could not start."""


def prepare_environment() -> None:
    """Sets what is not set yet. To be called before anything of Ray is imported."""
    for name, value in PREFERRED.items():
        os.environ.setdefault(name, value)
    for name in PORTS:
        os.environ.setdefault(name, str(free_port()))
