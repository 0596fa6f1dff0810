"""The body of a named merge. Apart from the replies, which clients read without the packages of adapters' files."""

from pydantic import ConfigDict, Field
from pydantic.config import JsonDict

from lori.merge_options import MAX_ADAPTERS
from lori.named_merge import MergedAdapter, NamedMerge
from server.schemas.fields import Body

EXAMPLE: JsonDict = {
    "base_digest": "5" * 64,
    "adapters": [{"reference": "intent@2296fef96b2b", "weight": 0.9}, {"reference": "safety@77041cc00657", "weight": 0.7}],
    "about": "by hand",
}


class MergedAdapterBody(MergedAdapter, Body):
    """An adapter of a named merge."""


class NamedMergeBody(NamedMerge, Body):
    """The body of PUT /merges/{name}: the content of a named merge's file."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    adapters: list[MergedAdapterBody] = Field(min_length=1, max_length=MAX_ADAPTERS)  # type: ignore[assignment]  # a subclass
