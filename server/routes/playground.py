"""GET / and /static: the playground, a page without a build step that asks this server alone.

Files are sent whole: starlette's errors for ranges would not have our shape, and none of these files is large.
"""

from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope


class WholeFiles(StaticFiles):
    """Files of one folder, to be mounted."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Answer with the file, or that it has not changed. Raises starlette's `HTTPException` where there is none."""
        scope["headers"] = [each for each in scope["headers"] if each[0] != b"range"]
        reply = await super().get_response(path, scope)
        reply.headers["Accept-Ranges"] = "none"
        return reply


PLAYGROUND = Path(__file__).parents[1] / "playground"
PAGE = "index.html"
POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
"""Nothing from elsewhere, nothing inline, in no other site's frame."""
HEADERS = {
    # No text becomes a program or markup.
    "Content-Security-Policy": f"{POLICY}; require-trusted-types-for 'script'; trusted-types 'none'",
    # Asked for again each time, and sent only where it has changed: the files of two versions never meet.
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
}


class PlaygroundFiles(WholeFiles):
    """Files of one folder, under the page's own rules."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Answer with the file, or that it has not changed. Raises starlette's `HTTPException` where there is none."""
        reply = await super().get_response(path, scope)
        reply.headers.update(HEADERS)
        return reply


router = APIRouter()
page = PlaygroundFiles(directory=PLAYGROUND)
static = PlaygroundFiles(directory=PLAYGROUND / "static")
"""To be mounted at /static."""


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def playground(http: Request) -> Response:
    """The page."""
    return await page.get_response(PAGE, http.scope)
