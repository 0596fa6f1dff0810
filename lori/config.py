"""`adapter_config.json`: PEFT's field names where PEFT has the field, ours under `lori`.

The file is written with a digest of itself, and read with every fault in one error. For an adapter that training, an import or a
merge has just made, this module computes the fields that follow from its B.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from lori.basis import Basis, Explicit, Seeded, explicit_name
from lori.errors import AdapterFormatError
from lori.identity import BaseIdentity, projection_of
from lori.names import NUM_VERSION_DIGITS
from lori.rice import MAX_ENTRIES
from lori.sparse import SparseB, ValueType
from lori.template import Template

MAX_RANK = 2**12
MAX_SIZE = 2**24
"""Maximum number of outputs or inputs of a module, far beyond any model's. Limits the memory that a hostile file can ask for."""

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
Alpha = Annotated[float, Field(ge=1e-9, le=1e9, allow_inf_nan=False)]
"""Within these bounds alpha / r, and the quotient of two such values, is a normal number in float32."""


class SeededConfig(BaseModel):
    """The seed that A is drawn from, see `lori.basis.Seeded`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    generator: Literal["philox-u24-1"]
    seed: int = Field(ge=0, lt=2**63)
    stream: int = Field(ge=0, lt=2**63)

    def __str__(self) -> str:
        return str(self.basis())

    def basis(self) -> Seeded:
        """Return the basis that this config names."""
        return Seeded(self.seed, self.stream, self.generator)


class ExplicitConfig(BaseModel):
    """A stored A: a file of the store, named by its content, see `lori.basis.Explicit`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    generator: Literal["explicit"] = "explicit"
    digest: Digest

    def __str__(self) -> str:
        return explicit_name(self.digest)


def basis_config(basis: Basis) -> SeededConfig | ExplicitConfig:
    """Return the config section for `basis`."""
    if isinstance(basis, Explicit):
        return ExplicitConfig(digest=basis.content_digest)
    return SeededConfig(generator=basis.generator, seed=basis.seed, stream=basis.stream)


def _check_finite(value: Any) -> Any:
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        _check_finite(part)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"it has the number {value}, which JSON has not")
    return value


def _check_version(version: object) -> object:
    if version == 1:
        raise ValueError("format 1 is not read any more: train again")
    return version


class Measured(BaseModel):
    """The measurement behind a figure in `metrics`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    num_rows: int = Field(ge=1)
    """Number of rows that were measured."""
    stderr: FiniteFloat | None = None
    """Standard error of the figure, if it has one."""
    data: str
    """File or data set that the rows came from."""
    template: Template
    """Template of the prompts."""
    versions: dict[str, str] = {}
    """Version of each adapter that was measured, by name; empty for the base."""


class LoriSection(BaseModel):
    """The fields that PEFT does not have."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    format_version: Annotated[Literal[2], BeforeValidator(_check_version)] = 2
    basis: SeededConfig | ExplicitConfig = Field(discriminator="generator")
    basis_digest: Digest
    """sha256 of A over all modules. Loading draws A again and compares the digest."""
    base_digest: Digest
    """sha256 that identifies the base model, see `lori.base_identity`."""
    content_digest: Digest
    """sha256 over everything that decides what the adapter does, see `lori.format.content_digest`. Begins with the version."""
    config_digest: Digest
    """sha256 over everything else in this file, see `lori.format.config_digest`."""
    shapes: dict[str, tuple[Size, Size]] = Field(min_length=1)
    """(outputs, inputs) of the modules, by projection name (`q_proj`); by full name for a module whose shape is an exception."""
    values: ValueType = "bfloat16"
    """Storage type of B's values."""
    sparsity: float = Field(ge=0, le=1)
    """Share of B's entries that the mask leaves out."""
    templates: tuple[Template, ...] = Field(min_length=1)
    """Templates that the adapter was trained on, the preferred one first."""
    merge_weights: dict[str, tuple[FiniteFloat, FiniteFloat]] = {}
    """Weights (this adapter's, the partner's) at which a merge with a partner was measured, by the partner's name."""
    training: Annotated[dict[str, Any], AfterValidator(_check_finite)] = {}
    """Record of the command that made the adapter: data, seed, steps, time; or an import's source, or a merge's parents."""
    metrics: dict[str, FiniteFloat] = {}
    """Figures measured on held-out rows, of the base and of the adapter."""
    measured: dict[str, Measured] = {}
    """The measurement behind each of `metrics`, if it was recorded."""


class AdapterConfig(BaseModel):
    """The `adapter_config.json` of one adapter."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    peft_type: Literal["LORI"] = "LORI"
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    base_model_name_or_path: str
    r: Rank
    lora_alpha: Alpha
    rank_pattern: dict[str, Rank] = {}
    """Ranks of the modules whose rank is not `r`, by full name."""
    alpha_pattern: dict[str, Alpha] = {}
    """Alphas of the modules whose alpha is not `lora_alpha`, by full name."""
    target_modules: tuple[str, ...] = Field(min_length=1)
    """Projection names (`q_proj`) if the adapter changes all such modules of the base, else full names."""
    lora_dropout: FiniteFloat = 0.0
    bias: Literal["none"] = "none"
    inference_mode: bool = True
    lori: LoriSection

    @model_validator(mode="after")
    def _check_mask_sizes(self) -> Self:
        rank = max(self.r, *self.rank_pattern.values()) if self.rank_pattern else self.r
        for name, (num_outputs, num_inputs) in self.lori.shapes.items():
            if max(num_outputs, num_inputs) * rank > MAX_ENTRIES:
                raise ValueError(f"{name} {num_outputs, num_inputs} at rank {rank} has more than {MAX_ENTRIES} entries")
        return self

    @property
    def base_name(self) -> str:
        """The base model's name and the first digits of its digest."""
        return f"{self.base_model_name_or_path} ({self.lori.base_digest[:NUM_VERSION_DIGITS]})"

    @property
    def scale(self) -> float:
        """alpha / r of the modules that are in neither `rank_pattern` nor `alpha_pattern`."""
        return self.lora_alpha / self.r

    def rank_of(self, module: str) -> int:
        """Return r of `module`."""
        return self.rank_pattern.get(module, self.r)

    def scale_of(self, module: str) -> float:
        """Return alpha / r of `module`."""
        return self.alpha_pattern.get(module, self.lora_alpha) / self.rank_of(module)

    def shape_of(self, module: str) -> tuple[int, int] | None:
        """Return (outputs, inputs) of `module`, or None if the config has no shape for the module."""
        return self.lori.shapes.get(module) or self.lori.shapes.get(projection_of(module))

    def is_target(self, module: str) -> bool:
        """Return whether the adapter changes `module`."""
        return module in self.target_modules or projection_of(module) in self.target_modules


def compact_shapes(shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Return `shapes` (by full name) as `LoriSection.shapes` has them: each projection's most common shape, then exceptions."""
    by_projection: dict[str, Counter[tuple[int, int]]] = {}
    for module, shape in shapes.items():
        by_projection.setdefault(projection_of(module), Counter())[shape] += 1
    common = {name: counts.most_common(1)[0][0] for name, counts in by_projection.items() if name not in shapes}
    return common | {module: shape for module, shape in shapes.items() if common.get(projection_of(module)) != shape}


def target_names(modules: Mapping[str, object], base: Mapping[str, object]) -> tuple[str, ...]:
    """Return `target_modules` of an adapter that changes `modules` of a `base`, both given by full name."""
    projections = dict.fromkeys(projection_of(module) for module in modules)
    is_complete = all(module in modules for module in base if projection_of(module) in projections)
    return tuple(projections if is_complete else modules)


CONFIG_FILE = "adapter_config.json"


def config_digest(content: bytes) -> str:
    """Return the sha256 (hex) of a config's JSON without its own digest. White space and the order of keys do not matter.

    Raises `ValueError` if Python's parser rejects the JSON.
    """
    document = json.loads(content)
    del document["lori"]["config_digest"]
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def seal_config(source: str, config: AdapterConfig) -> tuple[AdapterConfig, bytes]:
    """Return `config` with its own digest filled in, and its JSON.

    The JSON is parsed again, since pydantic does not validate a copy with updated fields. Raises `AdapterFormatError` about
    `source` if the config is not sound.
    """
    digest = config_digest(config.model_dump_json().encode())
    section = config.lori.model_copy(update={"config_digest": digest})
    content = (config.model_copy(update={"lori": section}).model_dump_json(indent=2) + "\n").encode()
    faults: list[str] = []
    sealed = parse_config(content, faults)
    if sealed is None or faults:
        raise AdapterFormatError(source, faults)
    return sealed, content


def parse_config(content: bytes, faults: list[str]) -> AdapterConfig | None:
    """Return the config in `content`, or None if it cannot be parsed. Adds every fault to `faults`."""
    try:
        config = AdapterConfig.model_validate_json(content)
        digest = config_digest(content)
    except ValidationError as error:
        faults += [f"{CONFIG_FILE}: {'.'.join(map(str, e['loc'])) or 'JSON'}: {e['msg']}" for e in error.errors()]
        return None
    except ValueError as error:  # pydantic's parser accepts JSON that Python's rejects, such as a number of 5,000 digits
        faults.append(f"{CONFIG_FILE}: JSON: {error}")
        return None
    if digest != config.lori.config_digest:
        faults.append(
            f"{CONFIG_FILE}: its digest is {digest}, expected {config.lori.config_digest}: it was changed, or is damaged"
        )
    return config


UNSEALED = "0" * 64
"""Placeholder for a digest that `lori.format.seal` fills in."""


def new_config(
    modules: Mapping[str, SparseB],
    basis: Basis,
    base: BaseIdentity,
    *,
    alphas: Mapping[str, float],
    target_modules: Sequence[str],
    values: ValueType = "bfloat16",
    templates: Sequence[Template],
    training: Mapping[str, Any],
) -> AdapterConfig:
    """Return the config of an adapter with these `modules` and `alphas` on `basis`; `lori.format.seal` fills in its digests.

    `modules` must not be empty; `base` needs the shapes of these modules only. Raises pydantic's `ValidationError` if the
    adapter could not be loaded again.
    """
    rank = Counter(b.shape[1] for b in modules.values()).most_common(1)[0][0]
    alpha = Counter(alphas[module] for module in modules).most_common(1)[0][0]
    shapes = {module: base.shapes[module] for module in modules}
    num_entries = sum(b.num_entries for b in modules.values())
    return AdapterConfig(
        base_model_name_or_path=base.name,
        r=rank,
        lora_alpha=alpha,
        rank_pattern={module: b.shape[1] for module, b in modules.items() if b.shape[1] != rank},
        alpha_pattern={module: alphas[module] for module in modules if alphas[module] != alpha},
        target_modules=tuple(target_modules),
        lori=LoriSection(
            basis=basis_config(basis),
            basis_digest=basis.digest({module: (b.shape[1], shapes[module][1]) for module, b in modules.items()}),
            base_digest=base.digest,
            content_digest=UNSEALED,
            config_digest=UNSEALED,
            shapes=compact_shapes(shapes),
            values=values,
            sparsity=1 - sum(b.values.numel() for b in modules.values()) / num_entries,
            templates=tuple(templates),
            training=dict(training),
        ),
    )
