"""Bodies and replies about adapters: lists, details, changes and comparisons."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from lori.merge_options import DefaultMerge
from lori.template import Template, Text
from server.engine.adapters.residents import Tier
from server.schemas.fields import AdapterName, Body

Matrix = list[list[float | None]]


class AdapterComparison(BaseModel):
    """The reply of GET /adapters/compare. Each matrix has a row and a column for each of `names`, in their order."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    names: list[str]
    cosine: Matrix
    """<ΔW_a, ΔW_b> / (|ΔW_a| |ΔW_b|) over all modules: 1 is the same direction, -1 the opposite. null if a delta is zero."""
    overlap: Matrix
    """The share of the smaller mask that the other mask has, too. null if a mask is empty, or if the adapters have different
    bases: the same entry of B then means different directions."""
    sign_conflict: Matrix
    """The share of entries whose signs differ, among those that are nonzero in both adapters: half by chance. null if there are
    no such entries, or if the adapters have different bases."""
    chance_overlap: Matrix
    """The `overlap` of masks that are spread at random. null in the same cases."""
    auto_weight: Matrix
    """The mean automatic weight that the column's adapter gets on prompts of the row's adapter, if all of `names` that have
    statistics of their prompts are named. An optimistic estimate from these. null if either has none of this server's
    background."""


HUB_ID = r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$"
REVISION = r"^\w[\w./-]*$"

Pair = Annotated[
    tuple[float, float],
    WithJsonSchema({"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}),
]
"""With a JSON schema that all tools understand."""


class AdapterInfo(BaseModel):
    """An adapter that requests can name. Sizes are in bytes."""

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
    has_prompt_statistics: bool
    """Whether its weight can be automatic: it has statistics of its prompts, made with this server's background."""
    metrics: dict[str, float]
    bytes_on_disk: int
    bytes_loaded: int
    """Bytes in RAM, ready to be made resident; 0 if it is not loaded."""
    bytes_resident: int
    """Bytes in the kernels' operands; 0 if it is not resident."""
    tier: Tier
    is_pinned: bool
    num_using: int | None
    """Requests under way that use this version by this name. With keys, only an admin sees it: the requests may be other
    tenants'."""
    last_used: float | None
    """Time when the last request began or ended, in seconds since 1970. With keys, only an admin sees it."""
    num_requests: int | None
    """Requests since the server started. With keys, only an admin sees it."""


class FaultyAdapter(BaseModel):
    """A damaged adapter of the store, which is not served."""

    model_config = {"use_attribute_docstrings": True}

    name: str
    """The reference by which requests would name it: a name, an alias, or `name@version`."""
    faults: list[str]
    """The faults of the adapter."""


class MergedAdapterInfo(BaseModel):
    """An adapter of a named merge."""

    model_config = {"use_attribute_docstrings": True}

    name: str
    version: str
    weight: float
    block_weights: list[float] = Field(default_factory=list, exclude_if=lambda weights: not weights)
    """Factors of the weight in blocks of layers, from the first to the last. Absent if the weight is the same in all layers."""


class NamedMergeInfo(BaseModel):
    """A named merge, which requests can name like an adapter."""

    model_config = {"use_attribute_docstrings": True}

    name: str
    adapters: list[MergedAdapterInfo]
    about: str
    """How the weights were chosen."""
    missing: list[str] = []
    """The adapters that the server does not have or that are damaged, as `name@version`. While there are any, requests for the
    merge are refused."""


class AdapterList(BaseModel):
    """The reply of GET /adapters, in order of name."""

    model_config = {"use_attribute_docstrings": True}

    base_model: str
    adapters: list[AdapterInfo]
    faulty: list[FaultyAdapter] = []
    """The damaged adapters, in order of name. With `limit`, those up to the last name of `adapters` and `merges`."""
    merges: list[NamedMergeInfo] = []
    """The named merges, in order of name. `limit` counts them, too."""
    default_merge: DefaultMerge
    """The weights of several adapters that a request names without any: `auto`, from the prompt where it can give them; `linear`,
    1/n each, also of a server without a background."""
    next: str | None = None
    """The value of `after` for the next page, if there are more than `limit`."""


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
    """Versions that requests can name, as `name@version`. The first is the name's current one."""
    aliases: list[str]
    """Other names of this version."""
    card: str
    """Markdown; empty if there is no card."""
    targets: list[str]
    basis: str
    modules: list[ModuleInfo]
    total: ModuleInfo


class WithdrawnReply(BaseModel):
    """The versions that requests can name no more."""

    model_config = {"use_attribute_docstrings": True}

    name: str
    versions: list[str]
    num_using: int
    """Requests under way that still use it, and end on it. 0 with the status 200."""


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
    """A branch, a tag or a commit; the main branch if absent."""
    name: AdapterName | None = None
    """The adapter's name on this server; its name on the hub if absent."""


class LoadLoraBody(Body):
    """The body of POST /v1/load_lora_adapter, as in vLLM."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"lora_name": "intent", "lora_path": "intent"}]})

    lora_name: AdapterName
    """The name that requests use from then on."""
    lora_path: Annotated[Text, Field(max_length=512)]
    """Not a path: an adapter in the server's store, as a name or `name@version`; or `hf://owner/name`, with the server's
    --hub."""
    load_inplace: bool = False
    """Lets an existing name refer to this adapter."""
    is_3d_lora_weight: bool = False
    """A field of vLLM. Only false is accepted."""


class UnloadLoraBody(Body):
    """The body of POST /v1/unload_lora_adapter, as in vLLM."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"lora_name": "intent"}]})

    lora_name: AdapterName
    lora_int_id: int | None = None
    """Ignored, as in vLLM."""
