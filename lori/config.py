"""`adapter_config.json`: PEFT's field names where PEFT has the field, ours under `lori`.

It is written with a digest of itself, and read with every fault in one error. For an adapter that training, an import or a merge
just made, the fields that follow from its B are computed here.
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
from lori.identity import BaseIdentity, last
from lori.names import NUM_VERSION_DIGITS
from lori.rice import MAX_ENTRIES
from lori.sparse import SparseB, ValueType
from lori.template import Template

MAX_RANK = 2**12
MAX_SIZE = 2**24
"""Outputs or inputs of a module, far beyond any model's: a hostile file cannot ask for more memory."""

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
Alpha = Annotated[float, Field(ge=1e-9, le=1e9, allow_inf_nan=False)]
"""Within these bounds alpha / r, and the quotient of two, is a sound number in float32."""


class SeededConfig(BaseModel):
    """What A is drawn from, see `lori.basis.Seeded`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    generator: Literal["philox-u24-1"]
    seed: int = Field(ge=0, lt=2**63)
    stream: int = Field(ge=0, lt=2**63)

    def __str__(self) -> str:
        return str(self.basis())

    def basis(self) -> Seeded:
        """Return the basis itself."""
        return Seeded(self.seed, self.stream, self.generator)


class ExplicitConfig(BaseModel):
    """An A that came along: a file of the store, named by its content, see `lori.basis.Explicit`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    generator: Literal["explicit"] = "explicit"
    digest: Digest

    def __str__(self) -> str:
        return explicit_name(self.digest)


def basis_config(basis: Basis) -> SeededConfig | ExplicitConfig:
    """Return what a config says of `basis`."""
    if isinstance(basis, Explicit):
        return ExplicitConfig(digest=basis.content_digest)
    return SeededConfig(generator=basis.generator, seed=basis.seed, stream=basis.stream)


def _is_finite(value: Any) -> Any:
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        _is_finite(part)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"it has the number {value}, which JSON has not")
    return value


def _is_read(version: object) -> object:
    if version == 1:
        raise ValueError("format 1 is not read any more: train again")
    return version


class Measured(BaseModel):
    """How a figure came about."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    num_rows: int = Field(ge=1)
    """The rows that it is a figure of."""
    stderr: FiniteFloat | None = None
    """Its standard error, where it has one."""
    data: str
    """The file or data set of the rows."""
    template: Template
    """How prompts were written."""
    versions: dict[str, str] = {}
    """The version of each adapter that was measured, by name; none of the base."""


class LoriSection(BaseModel):
    """What PEFT has no field for."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    format_version: Annotated[Literal[2], BeforeValidator(_is_read)] = 2
    basis: SeededConfig | ExplicitConfig = Field(discriminator="generator")
    basis_digest: Digest
    """sha256 of A over all modules: loading draws A again and compares."""
    base_digest: Digest
    """sha256 that identifies the base model, see `lori.base_identity`."""
    content_digest: Digest
    """sha256 over all that decides what the adapter does, see `lori.format.content_digest`; it begins the version."""
    config_digest: Digest
    """sha256 over everything else in this file, see `lori.format.config_digest`."""
    shapes: dict[str, tuple[Size, Size]] = Field(min_length=1)
    """(outputs, inputs) of the modules: by the last part of their names, or by full name where it differs from its like."""
    values: ValueType = "bfloat16"
    """How the values of B are stored."""
    sparsity: float = Field(ge=0, le=1)
    """The share of B's entries that are left out."""
    templates: tuple[Template, ...] = Field(min_length=1)
    """The templates that the adapter was trained on, the preferred one first."""
    merge_weights: dict[str, tuple[FiniteFloat, FiniteFloat]] = {}
    """For a partner's name: the weights (own, partner's) that a merge with it was measured at."""
    training: Annotated[dict[str, Any], AfterValidator(_is_finite)] = {}
    """The record of the command that made it: data, seed, steps, time; or an import's source, a merge's parents."""
    metrics: dict[str, FiniteFloat] = {}
    """Measured on held-out rows, base and adapter."""
    measured: dict[str, Measured] = {}
    """How each of `metrics` was measured, where that is known."""


class AdapterConfig(BaseModel):
    """One adapter's `adapter_config.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    peft_type: Literal["LORI"] = "LORI"
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    base_model_name_or_path: str
    r: Rank
    lora_alpha: Alpha
    rank_pattern: dict[str, Rank] = {}
    """The rank of a module whose rank is not `r`, by full name."""
    alpha_pattern: dict[str, Alpha] = {}
    """The alpha of a module whose alpha is not `lora_alpha`, by full name."""
    target_modules: tuple[str, ...] = Field(min_length=1)
    """The last parts of the modules' names where every such module of the base is one, else full names."""
    lora_dropout: FiniteFloat = 0.0
    bias: Literal["none"] = "none"
    inference_mode: bool = True
    lori: LoriSection

    @model_validator(mode="after")
    def _masks_can_be_read(self) -> Self:
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
        """alpha / r of most modules."""
        return self.lora_alpha / self.r

    def rank_of(self, module: str) -> int:
        """Return r of `module`."""
        return self.rank_pattern.get(module, self.r)

    def scale_of(self, module: str) -> float:
        """Return alpha / r of `module`."""
        return self.alpha_pattern.get(module, self.lora_alpha) / self.rank_of(module)

    def shape_of(self, module: str) -> tuple[int, int] | None:
        """Return (outputs, inputs) of `module`, or None where the config has none."""
        return self.lori.shapes.get(module) or self.lori.shapes.get(last(module))

    def is_target(self, module: str) -> bool:
        """Return whether the adapter changes `module`."""
        return module in self.target_modules or last(module) in self.target_modules


def compact(shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Return `shapes`, by full name, as `LoriSection.shapes` has them: what most modules of one last part share, said once."""
    by_last: dict[str, Counter[tuple[int, int]]] = {}
    for module, shape in shapes.items():
        by_last.setdefault(last(module), Counter())[shape] += 1
    common = {name: counts.most_common(1)[0][0] for name, counts in by_last.items() if name not in shapes}
    return common | {module: shape for module, shape in shapes.items() if common.get(last(module)) != shape}


def target_names(modules: Mapping[str, object], base: Mapping[str, object]) -> tuple[str, ...]:
    """Return `target_modules` of an adapter that changes `modules` of a `base`, both by full name."""
    lasts = dict.fromkeys(last(module) for module in modules)
    whole = all(module in modules for module in base if last(module) in lasts)
    return tuple(lasts if whole else modules)


CONFIG_FILE = "adapter_config.json"


def config_digest(content: bytes) -> str:
    """Return the sha256 (hex) of a config's JSON, its own digest left out: however it is spaced and ordered.

    Raises `ValueError` for what Python's parser does not read.
    """
    document = json.loads(content)
    del document["lori"]["config_digest"]
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def seal_config(source: str, config: AdapterConfig) -> tuple[AdapterConfig, bytes]:
    """Return `config` with its own digest, and its JSON, which is read again: a copy with changes was never checked.

    Raises `AdapterFormatError`, with `source`, where it is not sound.
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
    """Return the config that `content` is, if it is one; whatever is wrong with it is added to `faults`."""
    try:
        config = AdapterConfig.model_validate_json(content)
        found = config_digest(content)
    except ValidationError as error:
        faults += [f"{CONFIG_FILE}: {'.'.join(map(str, e['loc'])) or 'JSON'}: {e['msg']}" for e in error.errors()]
        return None
    except ValueError as error:  # what pydantic's parser takes and Python's does not: a number of 5,000 digits
        faults.append(f"{CONFIG_FILE}: JSON: {error}")
        return None
    if found != config.lori.config_digest:
        faults.append(
            f"{CONFIG_FILE}: its digest is {found}, expected {config.lori.config_digest}: it was changed, or is damaged"
        )
    return config


UNSEALED = "0" * 64
"""Stands where `lori.format.seal` puts a digest."""


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
    """Return the config of an adapter with these `modules`, and `alphas`, on `basis`; `lori.format.seal` fills in its digests.

    `modules` must not be empty; `base` needs the shapes of these modules only. Raises pydantic's `ValidationError` where the
    adapter would not be one that can be read.
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
            shapes=compact(shapes),
            values=values,
            sparsity=1 - sum(b.values.numel() for b in modules.values()) / num_entries,
            templates=tuple(templates),
            training=dict(training),
        ),
    )
