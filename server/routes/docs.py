"""GET /docs: a viewer of the API's description, which is in a package: nothing comes from elsewhere. Knows none of the routes."""

from importlib.resources import files

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.routes.playground import HEADERS, POLICY, WholeFiles, page

PAGE = "docs.html"
VIEWER = HEADERS | {
    # The viewer writes markup, and its style has pictures in it.
    "Content-Security-Policy": f"{POLICY}; img-src 'self' data:"
}
router = APIRouter()
static = WholeFiles(directory=str(files("fastapi_offline") / "static"))
"""To be mounted at /static/docs."""


@router.get("/docs", include_in_schema=False)
async def docs(http: Request) -> Response:
    """The page. Its places are relative, for a proxy may have put the server under a path."""
    reply = await page.get_response(PAGE, http.scope)
    reply.headers.update(VIEWER)
    return reply
