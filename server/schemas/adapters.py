"""Bodies about adapters: lists, details, changes and comparisons."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from lori.template import Template, Text
from server.engine.adapters.cache import Tier
from server.schemas.fields import AdapterName, Body

Matrix = list[list[float | None]]


class AdapterComparison(BaseModel):
    """The reply of GET /adapters/compare: every matrix has a row and a column for each of `names`, in their order."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    names: list[str]
    cosine: Matrix
    """<ΔW_a, ΔW_b> / (|ΔW_a| |ΔW_b|) over all modules: 1 is the same direction, -1 the opposite. null where a delta is zero."""
    overlap: Matrix
    """The share of the smaller mask that the other one has too. null on two bases, where an entry of B means two things."""
    sign_conflict: Matrix
    """The share of common entries, both not zero, whose signs differ: half by chance. null as there, or where there are none."""
    chance_overlap: Matrix
    """What `overlap` would be if each mask were spread at random. null as there."""


HUB_ID = r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$"
REVISION = r"^\w[\w./-]*$"

Pair = Annotated[
    tuple[float, float],
    WithJsonSchema({"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}),
]
"""Described so that all tools know what it is."""


class AdapterInfo(BaseModel):
    """An adapter that can be asked for. Sizes are in bytes."""

    model_config = {"use_attribute_docstrings": True}

    name: str
    version: str
    rank: int
    alpha: float
    sparsity: float
    density: float
    """The share of B's entries that are kept."""
    templates: list[Template]
    merge_weights: dict[str, Pair]
    metrics: dict[str, float]
    bytes_on_disk: int
    bytes_loaded: int
    """In RAM, ready to be made resident; 0 where it is not there."""
    bytes_resident: int
    """In the kernels' operands; 0 where it is not there."""
    tier: Tier
    is_pinned: bool
    num_using: int | None
    """Requests under way that use this version by this name. They may be others': with keys only an admin is told."""
    last_used: float | None
    """When the last of them began or ended, in seconds since 1970; likewise."""
    num_requests: int | None
    """Since the server started; likewise."""


class FaultyAdapter(BaseModel):
    """An adapter of the store that is damaged, and not served."""

    model_config = {"use_attribute_docstrings": True}

    name: str
    """As it is asked for: a name, an alias, or `name@version`."""
    faults: list[str]
    """What is wrong with it."""


class AdapterList(BaseModel):
    """The reply of GET /adapters, in order of name."""

    model_config = {"use_attribute_docstrings": True}

    base_model: str
    adapters: list[AdapterInfo]
    faulty: list[FaultyAdapter] = []
    """Those that are damaged, in order of name; with `limit`, those up to the last of `adapters`."""
    next: str | None = None
    """Where there are more than `limit`: what `after` is to be for the next ones."""


class ModuleInfo(BaseModel):
    """One module of an adapter, or all together. Norms are Frobenius norms of (alpha / r) B, and of (alpha / r) B A."""

    module: str
    num_rows: int
    num_entries: int
    num_kept: int
    density: float
    empty_rows: float
    max_abs: float
    norm_b: float
    norm_delta: float


class AdapterDetail(AdapterInfo):
    """The reply of GET /adapters/{name}."""

    versions: list[str]
    """That can be asked for, as `name@version`; the first is what the name means."""
    aliases: list[str]
    """Other names of this version."""
    card: str
    """Markdown; empty where there is none."""
    targets: list[str]
    basis: str
    modules: list[ModuleInfo]
    total: ModuleInfo


class WithdrawnReply(BaseModel):
    """What can be asked for no more."""

    model_config = {"use_attribute_docstrings": True}

    name: str
    versions: list[str]
    num_using: int
    """Requests under way that still use it, and end on it: 0 with the status 200."""


class AliasBody(Body):
    """The body of PUT /adapters/{name}/alias."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"adapter": "intent"}]})

    adapter: AdapterName
    """A name, or `name@version`."""


class HubBody(Body):
    """The body of POST /adapters for an adapter on the Hugging Face hub."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"hub_id": "someone/lori-intent", "name": "intent"}]})

    hub_id: Annotated[Text, Field(pattern=HUB_ID, max_length=200)]
    """`owner/name`."""
    revision: Annotated[Text, Field(pattern=REVISION, min_length=1, max_length=200)] | None = None
    """A branch, a tag or a commit; absent: the main branch."""
    name: AdapterName | None = None
    """What to call it; absent: as it is called on the hub."""


class LoadLoraBody(Body):
    """The body of POST /v1/load_lora_adapter, as vLLM has it."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"lora_name": "intent", "lora_path": "intent"}]})

    lora_name: AdapterName
    """What requests call it from then on."""
    lora_path: Annotated[Text, Field(max_length=512)]
    """No path: an adapter in the server's store, as a name or `name@version`; or `hf://owner/name`, with the server's --hub."""
    load_inplace: bool = False
    """Lets a name that is there already mean this one."""
    is_3d_lora_weight: bool = False
    """As vLLM has it: false alone."""


class UnloadLoraBody(Body):
    """The body of POST /v1/unload_lora_adapter, as vLLM has it."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"lora_name": "intent"}]})

    lora_name: AdapterName
    lora_int_id: int | None = None
    """Of no consequence, there as here."""
