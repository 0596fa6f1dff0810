"""Named merges: a name for several weighted adapters. Requests use it like an adapter's name.

A file `NAME.json` of a few kilobytes, which `python -m training.tune` writes. It names each adapter by its whole version, so that
a name always means the same sum.
"""

import json
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator, model_validator
from pydantic.config import JsonDict
from pydantic_core import ErrorDetails

from lori.config import Digest
from lori.errors import AdapterError
from lori.merge_options import MAX_ADAPTERS, MAX_WEIGHT
from lori.names import NUM_VERSION_DIGITS, check_name, is_name, weight_text
from lori.printable import printable
from lori.store.files import read_regular
from lori.template import Text

MAX_BYTES = 1 << 20
"""Maximum size of a file."""
SUFFIX = ".json"
MAX_BLOCKS = 128
"""Maximum number of blocks of layers: as many as the layers of the largest models."""
MAX_SHOWN = 4
"""Maximum number of blocks whose weights are shown one by one."""
MAX_DECIMALS = 17
"""Decimal places of a weight in a `model`'s name."""
MAX_ABOUT_CHARACTERS, MAX_SOURCE_CHARACTERS, MAX_SOURCES = 4096, 1024, 64
"""Maximum number of characters of `about` and of a source's name, and of sources. Such merges fit in `MAX_BYTES`."""

SourceName = Annotated[Text, Field(max_length=MAX_SOURCE_CHARACTERS)]
BlockWeight = Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT, allow_inf_nan=False)]


CONFIG = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)
EXAMPLE: JsonDict = {
    "base_digest": "5" * 64,
    "adapters": [{"reference": "intent@2296fef96b2b", "weight": 0.9}, {"reference": "safety@77041cc00657", "weight": 0.7}],
    "about": "by hand",
}


class MergedAdapter(BaseModel):
    """One adapter of a named merge."""

    model_config = CONFIG

    reference: str = Field(pattern=rf"^[^@]+@[0-9a-f]{{{NUM_VERSION_DIGITS}}}$")
    """`name@version` with all digits of the version."""
    weight: float = Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT, allow_inf_nan=False)
    """With at most 17 decimal places."""
    block_weights: list[BlockWeight] = Field(default=[], max_length=MAX_BLOCKS)
    """Factors of the weight in blocks of layers, from the first to the last; 1 in all layers if empty."""

    @field_validator("reference")
    @classmethod
    def _check_name(cls, reference: str) -> str:
        if not is_name(name := reference.partition("@")[0]):
            raise ValueError(f"{name[:80]!r} is no adapter's name")
        return reference

    @field_validator("weight")
    @classmethod
    def _check_decimals(cls, weight: float) -> float:
        if len(weight_text(weight).partition(".")[2]) > MAX_DECIMALS:
            raise ValueError(f"{weight!r} has more than {MAX_DECIMALS} decimal places")
        return weight

    @model_validator(mode="after")
    def _check_product(self) -> "MergedAdapter":
        largest = max(map(abs, self.block_weights), default=1.0) * abs(self.weight)
        if largest > MAX_WEIGHT:
            raise ValueError(f"weight times the largest block weight is {largest:g}, expected {MAX_WEIGHT:g} at most")
        return self

    @property
    def weights(self) -> list[float]:
        """The weight in each block of layers, or the one of all layers."""
        return [self.weight * factor for factor in self.block_weights or [1.0]]

    @property
    def name(self) -> str:
        """The adapter's name, without its version."""
        return self.reference.partition("@")[0]

    @property
    def version(self) -> str:
        """The adapter's version."""
        return self.reference.partition("@")[2]


class NamedMerge(BaseModel):
    """A weighted sum of adapters."""

    model_config = CONFIG | ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    format_version: Literal[1] = 1
    base_digest: Digest
    """Digest of the base model that the adapters belong to."""
    adapters: list[MergedAdapter] = Field(min_length=1, max_length=MAX_ADAPTERS)
    about: Annotated[Text, Field(max_length=MAX_ABOUT_CHARACTERS)] = ""
    """How the weights were chosen."""
    scores: dict[SourceName, FiniteFloat] = Field(default={}, max_length=MAX_SOURCES)
    """Share of the best single adapter's gain that the merge keeps, by source, on the rows that the weights were chosen on."""

    @field_validator("adapters")
    @classmethod
    def _check_references(cls, adapters: list[MergedAdapter]) -> list[MergedAdapter]:
        if duplicates := repeated(adapter.reference for adapter in adapters):
            raise ValueError(f"names {', '.join(duplicates)} twice, expected each adapter once")
        return adapters

    @property
    def has_block_weights(self) -> bool:
        """Whether an adapter's weight depends on the layer."""
        return any(adapter.block_weights for adapter in self.adapters)

    @property
    def model(self) -> str:
        """The sum as a name in OpenAI's `model` field, which cannot have block weights."""
        return "+".join(f"{adapter.reference}:{weight_text(adapter.weight)}" for adapter in self.adapters)

    def to_bytes(self) -> bytes:
        """Return the content of the file."""
        content = self.model_dump()
        for adapter in content["adapters"]:
            if not adapter["block_weights"]:
                del adapter["block_weights"]  # older versions can read files without them
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> "NamedMerge":
        """Return the merge in a file's content.

        Raises `AdapterError` with every fault. Repeated keys are reported only if there is no other fault.
        """
        try:
            merge = cls.model_validate_json(content)
        except ValidationError as error:
            faults = [_fault(one) for one in error.errors()]
            raise AdapterError(f"it is no sound named merge: {printable('; '.join(faults))}") from error
        if duplicates := _repeated_keys(content):
            raise AdapterError(f"it is no sound named merge: JSON: has {', '.join(duplicates)} twice in one object")
        return merge

    def check_base(self, base_digest: str) -> None:
        """Raise `AdapterError` if the adapters belong to another base than that of `base_digest`."""
        if self.base_digest != base_digest:
            raise AdapterError(f"base_digest is {self.base_digest}, expected {base_digest}: it is of another base")


def _fault(error: ErrorDetails) -> str:
    """Return the field, the fault, and what was found, unless the message has it."""
    field = ".".join(map(str, error["loc"])) or "JSON"
    input_text = "" if error["type"] in ("missing", "json_invalid", "value_error") else f", found {reprlib.repr(error['input'])}"
    return f"{field}: {error['msg'].removeprefix('Value error, ')}{input_text}"


def _repeated_keys(content: bytes) -> list[str]:
    """Return the keys that an object of the JSON has more than once. The parser keeps only the last value of each."""
    keys: set[str] = set()

    def note(pairs: list[tuple[str, object]]) -> None:
        keys.update(printable(repr(key)) for key in repeated(key for key, _ in pairs))

    json.loads(content, object_pairs_hook=note)
    return sorted(keys)


def weights_text(weights: Sequence[float]) -> str:
    """Return an adapter's weights in blocks of layers, or its only one, for people: all, or the range of many."""
    if len(weights) <= MAX_SHOWN:
        return " ".join(f"{weight:.4g}" for weight in weights)
    return f"{min(weights):.3g}…{max(weights):.3g} (in {len(weights)} blocks)"


def repeated(values: Iterable[str]) -> list[str]:
    """Return the values that occur more than once, sorted."""
    return sorted(value for value, count in Counter(values).items() if count > 1)


def read_named_merges(folder: Path, base_digest: str) -> Mapping[str, NamedMerge]:
    """Return the named merges in a folder by name, from its files `NAME.json`.

    Raises `OSError` if the folder cannot be read, and `AdapterError` with the faults of all files, a line for each: one that
    cannot be read or is unsound, has a name that no adapter may have, or is of another base than that of `base_digest`.
    """
    merges, faults = dict[str, NamedMerge](), list[str]()
    for file in sorted(path for path in folder.iterdir() if path.suffix == SUFFIX):
        try:
            check_name(file.stem)
            merge = NamedMerge.from_bytes(read_regular(file, MAX_BYTES))
            merge.check_base(base_digest)
            merges[file.stem] = merge
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not file.is_symlink():
                continue  # deleted meanwhile
            faults.append(f"{printable(str(file))} cannot be read: {error.strerror}")
        except AdapterError as error:
            faults.append(f"{printable(str(file))}: {error}")
    if faults:
        raise AdapterError("\n".join(faults))
    return merges
