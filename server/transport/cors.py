"""CORS: the requests that pages of other origins may send from a browser, and the headers that they see."""

from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp


class Cors(CORSMiddleware):
    """CORS middleware for pages of `origins`, the same for one server and for a cluster."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-ID"],
        )
