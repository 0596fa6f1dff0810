"""What the ingress has to know of a request before it goes on: whose adapters it names, and whether all replicas must hear it.

Knows no Ray. Nothing is checked here: a replica refuses what is wrong.
"""

import json
import re
from collections.abc import Iterator, Mapping

from lori.names import NAME
from server.cluster.affinity import ANY, key_of
from server.model_names import PART
from server.schemas.fields import MAX_ADAPTERS

MANAGED = ("/adapters", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
METRICS, ADAPTERS = "/metrics", "/adapters"
"""What is asked of all together; below the second each adapter alone is."""
SHOWN, COMPARED = re.compile(r"/adapters(/[^/]+)?"), "/adapters/compare"


def is_for_all(method: str, path: str) -> bool:
    """Says whether a request changes what each replica has, or asks for what only all know together."""
    if method == "GET":
        return path == METRICS or is_of_adapters(path)
    return is_change(method, path)


def is_change(method: str, path: str) -> bool:
    """Says whether a request changes what each replica has, which admins alone may."""
    return method in {"POST", "PUT", "DELETE"} and path.startswith(MANAGED)


def is_of_adapters(path: str) -> bool:
    """Says whether a GET of this path asks for adapters, or for one, with where they are and how much they are used."""
    return bool(SHOWN.fullmatch(path)) and path != COMPARED


def key_in(body: bytes, base_model: str) -> str:
    """Returns the key of the adapters that a request's body names, in any of the forms that the routes take."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):  # the replica says what is wrong with it
        return ANY
    return key_of(named_in(found, base_model)) if isinstance(found, dict) else ANY


def named_in(body: Mapping[str, object], base_model: str) -> Iterator[str]:
    """Yields the names of the adapters that a body's fields name, without versions; nothing that cannot be an adapter's name.

    A field that names more than `MAX_ADAPTERS` is not read: no replica takes it, and other requests would wait meanwhile.
    """
    for field in ("adapter", "adapters"):
        named = body.get(field)
        listed = named if isinstance(named, (list, tuple)) else [named]
        for one in listed if len(listed) <= MAX_ADAPTERS else ():
            reference = one.get("name") if isinstance(one, dict) else one
            if isinstance(reference, str) and NAME.fullmatch(name := reference.partition("@")[0]):
                yield name
    if isinstance(model := body.get("model"), str) and model != base_model and model.count("+") < MAX_ADAPTERS:
        yield from (part["reference"].partition("@")[0] for one in model.split("+") if (part := PART.fullmatch(one)))
