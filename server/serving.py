"""The life of one server: loads the service, listens, drains."""

from server.access.exposure import log_exposure
from server.app import create_app
from server.http_server import DrainingServer, http_config
from server.loading import load_service
from server.settings import Settings
from server.telemetry.tracing import Tracing


def serve(settings: Settings, tracing: Tracing | None) -> int:
    """Serve until SIGTERM or SIGINT, or until the engine dies. Return the exit code. Raises as `load_service`.

    Stops `tracing` at the end, also after an error.
    """
    try:
        return _serve(settings, tracing)
    finally:
        if tracing:
            tracing.stop()


def _serve(settings: Settings, tracing: Tracing | None) -> int:
    service = load_service(settings)
    app = create_app(service)
    if tracing:
        tracing.instrument(app)
    log_exposure(settings)
    server = DrainingServer(http_config(app, settings), service)
    server.run()
    return 1 if server.has_failed else 0
