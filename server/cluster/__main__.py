"""`python -m server.cluster`: serves on several replicas, on this machine or on a Ray cluster."""

import logging
import signal
import sys
from collections.abc import Callable
from queue import SimpleQueue
from types import FrameType

import anyio

from lori.printable import printable_lines
from server.access.exposure import ExposedError, check_exposure, log_exposure
from server.access.keys import KeyFileError, read_keys
from server.arguments import read_arguments
from server.cluster.environment import prepare_environment
from server.cluster.settings import ClusterSettings
from server.cluster.start_error import StartError
from server.telemetry.logs import configure_log
from server.telemetry.tracing import TracingError, start_tracing
from server.transport.ports import ListenError, check_port

logger = logging.getLogger(__name__)


def main() -> int:
    """Serves until SIGTERM or SIGINT; running requests may end first. Returns the exit code."""
    configure_log("text")
    signals = SimpleQueue[int]()

    def end(number: int, _: FrameType | None) -> None:
        signals.put(number)
        sys.exit(0)

    _on_signals(end)  # until it is ready
    try:
        _serve(_checked(), signals)
    except SystemExit:
        if signals.empty():
            raise
        return 0  # Ray makes another code of it
    except ExposedError as error:
        print(printable_lines(f"error: {error}"), file=sys.stderr)
        return 2
    except KeyFileError as error:
        print("error: " + "\n".join(error.lines), file=sys.stderr)
        return 1
    except (StartError, TracingError) as error:
        print(printable_lines(f"error: {error}"), file=sys.stderr)
        return 1
    return 0


def _checked() -> ClusterSettings:
    """Returns the settings, when all was checked that each process of Ray's would say after a minute, on many lines."""
    settings = read_arguments(ClusterSettings)
    configure_log(settings.log_format)
    check_exposure(settings)
    try:
        check_port(settings.host, settings.port)
    except OSError as error:
        raise StartError(str(ListenError(settings.host, settings.port, error))) from error
    if settings.keys:
        read_keys(settings.keys)
    if tracing := start_tracing(settings.otlp_traces_endpoint):
        tracing.stop()
    return settings


def _serve(settings: ClusterSettings, signals: SimpleQueue[int]) -> None:
    prepare_environment(settings)
    try:
        from server.cluster.serving import end_gently, serving  # noqa: PLC0415  # an extra, and it reads the environment
    except ImportError as error:
        raise StartError(f"a cluster needs: pip install '.[cluster]' ({error})") from error
    with serving(settings) as url:
        _on_signals(lambda number, _: signals.put(number))
        log_exposure(settings)
        logger.info("ready on %s", url)
        has_notice = signals.get() == signal.SIGTERM  # SIGINT comes from a person
        anyio.run(end_gently, settings.drain_notice_s if has_notice else None, settings.drain_s)


def _on_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
