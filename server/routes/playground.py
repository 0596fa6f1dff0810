"""GET / and /static: the playground, a page without a build step that only sends requests to this server.

Files are sent as a whole: starlette's errors for ranges would have another shape, and none of these files is large.
"""

from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope


class WholeFiles(StaticFiles):
    """Files of one folder, without ranges, to be mounted."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Return the file, or that it has not changed. Raises starlette's `HTTPException` if there is none."""
        scope["headers"] = [header for header in scope["headers"] if header[0] != b"range"]
        reply = await super().get_response(path, scope)
        reply.headers["Accept-Ranges"] = "none"
        return reply


PLAYGROUND = Path(__file__).parents[1] / "playground"
PAGE = "index.html"
POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
"""No content from elsewhere, no inline scripts or styles, and no frame on another site."""
HEADERS = {
    # No text becomes a script or markup.
    "Content-Security-Policy": f"{POLICY}; require-trusted-types-for 'script'; trusted-types 'none'",
    # Revalidated each time, and sent only if it has changed: the files of two versions never mix.
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
}


class PlaygroundFiles(WholeFiles):
    """Files of one folder, under the page's security headers."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Return the file, or that it has not changed. Raises starlette's `HTTPException` if there is none."""
        reply = await super().get_response(path, scope)
        reply.headers.update(HEADERS)
        return reply


router = APIRouter()
page = PlaygroundFiles(directory=PLAYGROUND)
static = PlaygroundFiles(directory=PLAYGROUND / "static")
"""The app to mount at /static."""


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def playground(http: Request) -> Response:
    """Return the page."""
    return await page.get_response(PAGE, http.scope)
