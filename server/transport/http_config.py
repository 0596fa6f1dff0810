"""uvicorn's configuration: the HTTP protocol and the time limits of every server of this project.

Shared by `python -m server` and the tests, so that the tests run the real configuration.
"""

import math

import uvicorn
from starlette.types import ASGIApp

from server.settings import Settings
from server.transport.drain import GRACE_S
from server.transport.http_protocol import HttpProtocol


def http_config(app: ASGIApp, settings: Settings) -> uvicorn.Config:
    """Return the configuration of a server that answers with `app` at the address of `settings`."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=HttpProtocol,
        ws="none",  # a web socket request is answered like any other
        lifespan="on",  # otherwise uvicorn ignores a task that fails
        log_config=None,  # our log configuration also covers uvicorn's loggers
        access_log=False,
        timeout_keep_alive=math.ceil(settings.keep_alive_s),
        timeout_graceful_shutdown=GRACE_S,
    )
