"""uvicorn's configuration: the HTTP protocol and the time limits that every server of this project runs with.

One place for `python -m server` and for the tests, so that what is tested is what is served.
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
        ws="none",  # a request for a web socket is answered as any other
        lifespan="on",  # else uvicorn says nothing of a task that fails
        log_config=None,  # the configuration of our log holds for uvicorn's loggers
        access_log=False,
        timeout_keep_alive=math.ceil(settings.keep_alive_s),
        timeout_graceful_shutdown=GRACE_S,
    )
