"""GET /docs: a viewer of the API's description, which is in a package: nothing comes from elsewhere. Knows none of the routes."""

from importlib.resources import files

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse

from server.routes.whole_files import WholeFiles

ASSETS = "static/docs"
STYLE = '<link rel="stylesheet" href="static/docs.css">'
"""What the viewer's own style leaves ugly; it is served with the playground's."""
router = APIRouter()
static = WholeFiles(directory=str(files("fastapi_offline") / "static"))
"""To be mounted at /static/docs."""


@router.get("/docs", include_in_schema=False)
async def docs() -> HTMLResponse:
    """The page. Its places are relative, for a proxy may have put the server under a path."""
    page = get_swagger_ui_html(
        openapi_url="openapi.json",
        title="lori-server",
        swagger_js_url=f"{ASSETS}/swagger-ui-bundle.js",
        swagger_css_url=f"{ASSETS}/swagger-ui.css",
        swagger_favicon_url="data:,",
        swagger_ui_parameters={"validatorUrl": None, "defaultModelsExpandDepth": 0},
    )
    return HTMLResponse(bytes(page.body).decode().replace("</head>", f"{STYLE}</head>"))
