"""Routing facts of a request: the adapters that it names, its number of prompts, and whether all replicas must get it.

Knows no Ray. Checks nothing: a replica refuses wrong requests. A body is parsed on the event loop, where only the few values
needed are built: a mebibyte takes at most 3 ms, and a batch of prompts as much again.
"""

import re
from codecs import BOM_UTF8

import msgspec
from msgspec import Raw
from msgspec.structs import astuple

from server.affinity import ANY, adapter_names, key_of
from server.schemas.completions import MAX_PROMPTS

ADMIN_PREFIXES = ("/adapters", "/merges", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
METRICS_PATH, ADAPTERS_PATH = "/metrics", "/adapters"
"""GET requests that all replicas answer together. Below the second are those for one adapter."""
COMPLETIONS_PATH = "/v1/completions"
"""The only route that accepts several prompts."""
ADAPTER_PATH, COMPARE_PATH = re.compile(r"/adapters(/[^/]+)?"), "/adapters/compare"
MAX_NAMING_BYTES = 32 * 1024
"""Maximum number of bytes of a field that names adapters: three times what a replica accepts. Parsing a longer one would delay
other requests."""
ABSENT = Raw()
INVALID = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""Exceptions for text that is no JSON, or not of the required type."""


class Fields(msgspec.Struct):
    """The fields of a body that an ingress reads, as JSON. The others are skipped."""

    model: Raw = ABSENT
    adapter: Raw = ABSENT
    adapters: Raw = ABSENT
    prompt: Raw = ABSENT


Prompts = msgspec.defstruct("Prompts", [(f"prompt_{number}", Raw, ABSENT) for number in range(MAX_PROMPTS + 1)], array_like=True)
"""The first elements of a list. Later ones are skipped; a list of type `Raw` would build an object for each of them."""
BODY, PROMPTS = msgspec.json.Decoder(Fields), msgspec.json.Decoder(Prompts)
BATCH = re.compile(rb"\s*\[\s*[\[\"]")
"""The beginning of several prompts, unlike one that is a text or a list of token ids."""


def is_for_all_replicas(method: str, path: str) -> bool:
    """Return whether a request changes all replicas, or needs the replies of all of them."""
    if method == "GET":
        return path == METRICS_PATH or is_adapter_query(path)
    return is_change(method, path)


def is_change(method: str, path: str) -> bool:
    """Return whether a request changes the adapters or merges of each replica, for which it needs an admin's key."""
    return method in {"POST", "PUT", "DELETE"} and path.startswith(ADMIN_PREFIXES)


def is_adapter_query(path: str) -> bool:
    """Return whether GET of this path shows adapters, or one adapter, with their tiers and use."""
    return bool(ADAPTER_PATH.fullmatch(path)) and path != COMPARE_PATH


def read_fields(body: bytes) -> Fields:
    """Return the fields of a request's body; empty if it is no JSON object, which a replica then refuses."""
    try:
        return BODY.decode(body.removeprefix(BOM_UTF8))
    except INVALID:
        return Fields()


def affinity_key(fields: Fields, base_model: str) -> str:
    """Return the key of the adapters that a request's body names, in any form that the routes accept."""
    raws = {"adapter": fields.adapter, "adapters": fields.adapters, "model": fields.model}
    try:
        values = {name: msgspec.json.decode(raw) for name, raw in raws.items() if 0 < len(raw) <= MAX_NAMING_BYTES}
    except INVALID:
        return ANY
    return key_of(adapter_names(values, base_model))


def num_prompts(fields: Fields) -> int:
    """Return the number of prompts in a completion's body. A body that a replica refuses counts as 1: no prompt, or too many."""
    if not BATCH.match(fields.prompt):
        return 1
    try:
        elements = astuple(PROMPTS.decode(fields.prompt))
    except INVALID:
        return 1
    number = len(elements) - elements.count(ABSENT)
    return number if number <= MAX_PROMPTS else 1
