"""Routing facts of a request: the adapters that it names, its number of prompts, and whether all replicas must get it.

Knows no Ray. Nothing is checked here: a replica refuses what is wrong. A body is read on the event loop, where no value of it is
built but the few that are asked for: a mebibyte takes 3 ms at most, and a batch of prompts as much again.
"""

import re
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping

import msgspec
from msgspec import Raw
from msgspec.structs import astuple

from lori.names import NAME
from server.cluster.affinity import ANY, key_of
from server.model_names import find_parts
from server.schemas.completions import MAX_PROMPTS
from server.schemas.fields import MAX_ADAPTERS

MANAGED = ("/adapters", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
METRICS, ADAPTERS = "/metrics", "/adapters"
"""What is asked of all together; below the second each adapter alone is."""
COMPLETIONS = "/v1/completions"
"""The one route that takes several prompts."""
SHOWN, COMPARED = re.compile(r"/adapters(/[^/]+)?"), "/adapters/compare"
MAX_NAMING_BYTES = 32 * 1024
"""Of a field that names adapters: what a replica takes is three times shorter, and a longer one would hold up other requests."""
ABSENT = Raw()
INVALID = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""Raised for what is no JSON, or not of the type that is asked for."""


class Fields(msgspec.Struct):
    """The fields of a body that an ingress reads, as JSON; the others are passed over."""

    model: Raw = ABSENT
    adapter: Raw = ABSENT
    adapters: Raw = ABSENT
    prompt: Raw = ABSENT


Prompts = msgspec.defstruct("Prompts", [(f"prompt_{number}", Raw, ABSENT) for number in range(MAX_PROMPTS + 1)], array_like=True)
"""A list's elements; it passes over those beyond, of which a list of type `Raw` would build an object each."""
BODY, PROMPTS = msgspec.json.Decoder(Fields), msgspec.json.Decoder(Prompts)
BATCH = re.compile(rb"\s*\[\s*[\[\"]")
"""How several prompts begin, unlike one that is a text or a list of token ids."""


def is_for_all(method: str, path: str) -> bool:
    """Return whether a request changes what each replica has, or asks for what only all know together."""
    if method == "GET":
        return path == METRICS or is_of_adapters(path)
    return is_change(method, path)


def is_change(method: str, path: str) -> bool:
    """Return whether a request changes what each replica has, which admins alone may."""
    return method in {"POST", "PUT", "DELETE"} and path.startswith(MANAGED)


def is_of_adapters(path: str) -> bool:
    """Return whether a GET of this path asks for adapters, or for one, with where they are and how much they are used."""
    return bool(SHOWN.fullmatch(path)) and path != COMPARED


def read_fields(body: bytes) -> Fields:
    """Return the fields of a request's body; none where it is no JSON object: a replica says what is wrong with it."""
    try:
        return BODY.decode(body.removeprefix(BOM_UTF8))
    except INVALID:
        return Fields()


def key_in(fields: Fields, base_model: str) -> str:
    """Return the key of the adapters that a request's body names, in any of the forms that the routes take."""
    raws = {"adapter": fields.adapter, "adapters": fields.adapters, "model": fields.model}
    try:
        values = {name: msgspec.json.decode(raw) for name, raw in raws.items() if 0 < len(raw) <= MAX_NAMING_BYTES}
    except INVALID:
        return ANY
    return key_of(named_in(values, base_model))


def num_prompts(fields: Fields) -> int:
    """Return how many prompts a completion's body has; 1 where they are more than a replica takes, or none."""
    if not BATCH.match(fields.prompt):
        return 1
    try:
        elements = astuple(PROMPTS.decode(fields.prompt))
    except INVALID:
        return 1
    number = len(elements) - elements.count(ABSENT)
    return number if number <= MAX_PROMPTS else 1


def named_in(body: Mapping[str, object], base_model: str) -> Iterator[str]:
    """Yield the names of the adapters that a body's fields name, without versions; nothing that cannot be an adapter's name.

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
        yield from (part["reference"].partition("@")[0] for part in find_parts(model) if part)
