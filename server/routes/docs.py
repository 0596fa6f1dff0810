"""GET /docs: a viewer of the API's description, from an installed package, so that nothing is loaded from elsewhere.

Knows none of the routes.
"""

from importlib.resources import files

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.routes.playground import HEADERS, POLICY, WholeFiles, page

PAGE = "docs.html"
VIEWER = HEADERS | {
    # The viewer writes markup, and its style sheet embeds pictures.
    "Content-Security-Policy": f"{POLICY}; img-src 'self' data:"
}
router = APIRouter()
static = WholeFiles(directory=str(files("fastapi_offline") / "static"))
"""The app to mount at /static/docs."""


@router.get("/docs", include_in_schema=False)
async def docs(http: Request) -> Response:
    """Return the page. Its links are relative, because a proxy may serve it under a path."""
    reply = await page.get_response(PAGE, http.scope)
    reply.headers.update(VIEWER)
    return reply
