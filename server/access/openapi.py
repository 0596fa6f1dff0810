"""What the API's description says of keys."""

from typing import Any

from fastapi import FastAPI

from server.access.gate import is_open

SCHEME = "key"
REFUSALS = {
    "401": "No key, or none that is known",
    "403": "The key's role does not allow it",
}


class KeyedApi(FastAPI):
    """An application whose routes need a key, but for the open ones."""

    def openapi(self) -> dict[str, Any]:
        """Returns the description of the routes."""
        schema = super().openapi()
        said = "A key that the operator made with `python -m server.keys`."
        schema["components"]["securitySchemes"] = {SCHEME: {"type": "http", "scheme": "bearer", "description": said}}
        for path, operations in schema["paths"].items():
            if not is_open(path):
                for operation in operations.values():
                    _needs_key(operation)
        return schema


def _needs_key(operation: dict[str, Any]) -> None:
    operation["security"] = [{SCHEME: []}]
    content = operation["responses"]["4XX"]["content"]
    operation["responses"] |= {status: {"description": said, "content": content} for status, said in REFUSALS.items()}
