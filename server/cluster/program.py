"""The program `python -m server.cluster`: reads its flags, logs that it starts, and only then imports Ray and starts it."""

import logging
import signal
import sys
from collections.abc import Callable
from queue import SimpleQueue
from types import FrameType

import anyio

from lori.flags import PACKAGE, package_version
from lori.names import EMBEDDED_NAME
from lori.printable import printable_lines
from server.access.exposure import ExposedError, log_exposure
from server.access.keys import KeyFileError
from server.arguments import GROUPS, read_arguments
from server.cluster.environment import StartError, prepare_environment
from server.cluster.settings import ClusterSettings
from server.start_checks import check_start
from server.telemetry.logs import configure_log, configure_start
from server.telemetry.tracing import TracingError, start_tracing
from server.transport.sockets import ListenError

logger = logging.getLogger(__name__)
OnSignal = Callable[[int, FrameType | None], None]


def run() -> int:
    """Serve until SIGTERM or SIGINT, after which running requests may end. Return the exit code."""
    configure_log("text")
    signals = SimpleQueue[int]()

    def end(number: int, _: FrameType | None) -> None:
        signals.put(number)
        sys.exit(0)

    signal.signal(signal.SIGTERM, end)  # until the cluster is ready
    try:
        _serve(_checked(), signals, end)
    except SystemExit:
        if signals.empty():
            raise
        return 0  # Ray would change the exit code
    except ExposedError as error:
        print(printable_lines(f"error: {error}"), file=sys.stderr)
        return 2
    except KeyFileError as error:
        print("error: " + "\n".join(error.lines), file=sys.stderr)
        return 1
    except (ListenError, StartError, TracingError) as error:
        print(printable_lines(f"error: {error}"), file=sys.stderr)
        return 1
    return 0


def _checked() -> ClusterSettings:
    """Return the settings, after the checks whose errors each of Ray's processes would report after a minute, on many lines."""
    settings = read_arguments(ClusterSettings, GROUPS)
    configure_start(settings.log_format)
    check_start(settings)
    if tracing := start_tracing(settings.otlp_traces_endpoint):
        tracing.stop()
    return settings


def _serve(settings: ClusterSettings, signals: SimpleQueue[int], end: OnSignal) -> None:
    logger.info("%s %s starts a cluster: importing Ray …", PACKAGE, package_version())
    prepare_environment(settings)
    try:
        from server.cluster.serving import end_gently, serving  # noqa: PLC0415  # an extra, and it reads the environment
    except ImportError as error:
        raise StartError(f"a cluster needs: pip install '.[cluster]' ({error})") from error
    _on_signals(end)  # from here on there are processes to end
    model, num_replicas = settings.model or EMBEDDED_NAME, _num_replicas(settings)
    logger.info("starting Ray and %s of %s, each of which imports torch and loads the model …", num_replicas, model)
    with serving(settings) as url:
        _on_signals(lambda number, _: signals.put(number))
        log_exposure(settings)
        logger.info("ready on %s: %s of %s", url, num_replicas, model)
        has_notice = signals.get() == signal.SIGTERM  # SIGINT comes from a person
        anyio.run(end_gently, settings.drain_notice_s if has_notice else None, settings.drain_s)


def _num_replicas(settings: ClusterSettings) -> str:
    if settings.max_replicas:
        return f"{settings.replicas} to {settings.max_replicas} replicas"
    return f"{settings.replicas} replica{'s' * (settings.replicas > 1)}"


def _on_signals(handler: OnSignal) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)
