"""`python -m server.cluster`: serves on several replicas, on this machine or on a Ray cluster."""

import logging
import signal
import sys
from queue import SimpleQueue

import anyio

from server.access.exposure import ExposedError, check_exposure, log_exposure
from server.access.keys import KeyFileError, read_keys
from server.arguments import read_arguments
from server.cluster.environment import prepare_environment
from server.cluster.settings import ClusterSettings
from server.telemetry.logs import configure_log
from server.telemetry.tracing import TracingError, start_tracing
from server.transport.ports import check_port

logger = logging.getLogger(__name__)


def main() -> int:
    """Serves until SIGTERM or SIGINT; running requests may end first. Returns the exit code."""
    configure_log("text")
    try:
        settings = read_arguments(ClusterSettings)
        configure_log(settings.log_format)
        check_exposure(settings)
        check_port(settings.host, settings.port)
        # What each process does again, and says so after a minute on many lines of Ray's.
        if settings.keys:
            read_keys(settings.keys)
        if tracing := start_tracing(settings.otlp_traces_endpoint):
            tracing.stop()
    except ExposedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyFileError as error:
        print("error: " + "\n".join(error.lines), file=sys.stderr)
        return 1
    except TracingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: cannot listen on {settings.host}:{settings.port}: {error.strerror}; pass another --port", file=sys.stderr)
        return 1
    prepare_environment(settings)
    try:
        from server.cluster.serving import StartError, end_gently, serving  # noqa: PLC0415  # an extra, and it reads the environment
    except ImportError as error:
        print(f"error: a cluster needs: pip install '.[cluster]' ({error})", file=sys.stderr)
        return 1
    try:
        with serving(settings) as url:
            ending = SimpleQueue[int]()
            for number in (signal.SIGTERM, signal.SIGINT):  # only now: until then, and before this, they are Ray's
                signal.signal(number, lambda number, _: ending.put(number))
            log_exposure(settings)
            logger.info("ready on %s", url)
            has_notice = ending.get() == signal.SIGTERM  # SIGINT comes from a person
            anyio.run(end_gently, settings.drain_notice_s if has_notice else None, settings.drain_s)
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
