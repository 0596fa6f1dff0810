"""A folder's files, sent whole: starlette's refusals of ranges are no errors of our shape, and none of these is large."""

from fastapi.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope


class WholeFiles(StaticFiles):
    """Files of one folder, to be mounted."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Answers with the file, or that it has not changed. Raises starlette's `HTTPException` where there is none."""
        scope["headers"] = [each for each in scope["headers"] if each[0] != b"range"]
        reply = await super().get_response(path, scope)
        reply.headers["Accept-Ranges"] = "none"
        return reply
