"""PEFT's `adapter_config.json`: the fields that decide what a LoRA adapter does. Knows no tensors.

Names and meanings are those of PEFT's `LoraConfig` (peft/tuners/lora/config.py, 0.21).
"""

import math
import re
import reprlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, PlainSerializer, ValidationError
from pydantic_core import from_json

from lori.config import CONFIG_FILE, Alpha, Rank
from lori.errors import FOLDER
from lori.names import EMBEDDED_NAME

Value = TypeVar("Value")

TEMPLATES_FILE = "lori.json"
"""File that our export adds to PEFT's files: the prompt templates, for which PEFT has no field."""

HARMLESS_INITS = ("gaussian", "orthogonal", "eva", "mica")
"""Accepted initializations of A and B. Every other named initialization also changes the weights of the base."""

INERT = frozenset(
    (
        "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "layers_pattern",
        "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_core", "qalora_group_size", "revision",
        "runtime_config",
    )
)  # fmt: skip
"""Fields that do not matter once the weights are trained: they select modules, or initialize the training."""

SAFE_PATTERN = re.compile(r"(?!.*\)[*+?{])[\w.*+?|^$()\[\]\\-]{1,512}")
"""Accepted module patterns: those without a repeated group."""
CHOICE = re.compile(r"[*+?(]")
"""Parts of a pattern that can match a text in several ways: repetitions, and groups with alternatives."""
MAX_CHOICES, MAX_ALTERNATIVES, MAX_PATTERNS, MAX_ALL_CHOICES = 4, 64, 4096, 256
"""Maximum number of choices and of alternatives in a pattern, of patterns in a config, and of choices in all its patterns.
Python's `re` backtracks through all choices while it holds the GIL: thirty times (.|.) would stop the server."""

PEFT_TYPE = re.compile(r"[A-Z][A-Z0-9_]{0,39}")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
"""Base model names that are safe to print as part of a command."""

NO_LORA = "it cannot be imported, since only plain LoRA adds B A x to a layer's output, as LoRI does"
"""End of the fault of a PEFT adapter of another type."""
SWITCHES = frozenset(("arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "velora_config"))
"""Fields that turn a PEFT variant on by their mere presence, even if empty."""


def _check_init(value: bool | str | None) -> bool | str | None:
    if isinstance(value, str) and value.lower() not in HARMLESS_INITS:
        raise ValueError(
            "it may have changed the base's weights: only an adapter that PEFT converted to plain LoRA can be imported"
        )
    return value


def _num_choices(key: str) -> int:
    return len(CHOICE.findall(key))


def _check_patterns(pattern: dict[str, Value] | None) -> dict[str, Value] | None:
    num_patterns, num_choices = len(pattern or {}), sum(map(_num_choices, pattern or {}))
    if num_patterns > MAX_PATTERNS or num_choices > MAX_ALL_CHOICES:
        raise ValueError(
            f"{num_patterns} patterns of module names with {num_choices} groups and repetitions, expected at most {MAX_PATTERNS} "
            f"with {MAX_ALL_CHOICES}: matching them could take forever"
        )
    for key in pattern or {}:
        if not SAFE_PATTERN.fullmatch(key) or _num_choices(key) > MAX_CHOICES or key.count("|") >= MAX_ALTERNATIVES:
            raise ValueError(f"{reprlib.repr(key)} is not an accepted pattern of module names: matching it could take forever")
        try:
            _compile(key)
        except re.error as error:
            raise ValueError(f"{key!r} is no regular expression: {error}") from error
    return pattern


@lru_cache(maxsize=2 * MAX_PATTERNS)
def _compile(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


PeftAlpha = Annotated[Alpha, PlainSerializer(lambda alpha: int(alpha) if alpha.is_integer() else alpha, return_type=int | float)]
"""Alpha in PEFT's JSON form: an integer if the value is whole."""


class PeftConfig(BaseModel):
    """The fields of a LoRA adapter's config that matter here. Keys of patterns follow PEFT's rules, see `match_pattern`."""

    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)

    peft_type: Literal["LORA"]
    task_type: str | None = "CAUSAL_LM"
    base_model_name_or_path: str | None = None
    peft_version: str | None = None
    r: Rank
    lora_alpha: PeftAlpha
    rank_pattern: Annotated[dict[str, Rank] | None, AfterValidator(_check_patterns)] = None
    alpha_pattern: Annotated[dict[str, PeftAlpha] | None, AfterValidator(_check_patterns)] = None
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r (Kalajdzievski 2023, arXiv 2312.03732)."""
    target_modules: tuple[str, ...] | str | None = None
    bias: Literal["none"] = "none"
    lora_dropout: float = 0.0
    init_lora_weights: Annotated[bool | str | None, AfterValidator(_check_init)] = True
    inference_mode: bool = True

    def rank_of(self, module: str) -> int:
        """Return r of `module`, a full name in the base."""
        return match_pattern(self.rank_pattern or {}, module, self.r)

    def alpha_of(self, module: str) -> float:
        """Return the alpha of `module` for which alpha / r equals PEFT's scale, also with rsLoRA."""
        alpha = match_pattern(self.alpha_pattern or {}, module, self.lora_alpha)
        return alpha * math.sqrt(self.rank_of(module)) if self.use_rslora else alpha


def match_pattern(pattern: Mapping[str, Value], module: str, default: Value) -> Value:
    """Return the value of the first key of `pattern` that matches `module`, else `default`.

    A key is a regular expression for the full name, or for the part of the name after any dot (PEFT, `get_pattern_key` in
    peft/utils/other.py). If none matches, a key equal to the name counts. The first match in the file's order wins, not the
    longest.
    """
    for key, value in pattern.items():
        if _compile(key).match(module):
            return value
    return pattern.get(module, default)


def exact_pattern(module: str) -> str:
    """Return the pattern that matches only `module`, a full name."""
    return "^" + re.escape(module)


def parse_peft_config(content: bytes, faults: list[str]) -> PeftConfig | None:
    """Return the config of a PEFT adapter, or None. Adds every fault to `faults`.

    Faults are also unknown fields that are set, and fields that select a variant other than plain LoRA.
    """
    try:
        return _config(from_json(content), faults)
    except ValueError as error:
        faults.append(f"{CONFIG_FILE}: JSON: {error}")
        return None


def peft_fault(content: bytes) -> str | None:
    """Return the fault of a PEFT adapter's config in place of a LoRI config: the command to import it, or why that is impossible.

    None for any other content. The fault is one line, names no path and quotes little of the config.
    """
    try:
        document = from_json(content)
    except ValueError:
        return None
    if (kind := _peft_type(document)) is None:
        return None
    faults: list[str] = []
    _config(document, faults)
    if faults and kind != "LORA":
        return faults[0]
    if faults:
        num_more = f" (and {len(faults) - 1} more)" if faults[1:] else ""
        first = faults[0].removeprefix(f"{CONFIG_FILE}: ")
        return f"{CONFIG_FILE}: it is a PEFT LoRA that cannot be imported: {first}{num_more}"
    command = f"python -m lori import {FOLDER} STORE{_model_flag(document.get('base_model_name_or_path'))}"
    return f"{CONFIG_FILE}: it is a PEFT LoRA: `{command}` makes an adapter of it in STORE, another folder, which can be served"


def _config(document: Any, faults: list[str]) -> PeftConfig | None:
    if (kind := _peft_type(document)) and kind != "LORA":
        faults.append(f"{CONFIG_FILE}: peft_type is {kind}: {NO_LORA}")
        return None
    if isinstance(document, dict):
        faults += _unsupported(document)
    try:
        return PeftConfig.model_validate(document)
    except ValidationError as error:
        faults += [f"{CONFIG_FILE}: {_place(e['loc'])}: {e['msg']}, found {reprlib.repr(e['input'])}" for e in error.errors()]
        return None


def _peft_type(document: Any) -> str | None:
    """Return `peft_type` of a PEFT config; None for a LoRI config and for any other document."""
    if not isinstance(document, dict) or "lori" in document:
        return None
    kind = document.get("peft_type")
    return kind if isinstance(kind, str) and PEFT_TYPE.fullmatch(kind) and kind != "LORI" else None


def _model_flag(base: object) -> str:
    if isinstance(base, str) and base.rpartition("/")[2] == EMBEDDED_NAME:
        return ""
    return f" --model {base}" if isinstance(base, str) and HUB_ID.fullmatch(base) else " --model BASE"


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(map(str, location)) or "JSON"


def _unsupported(document: Mapping[str, Any]) -> list[str]:
    unknown = {name: value for name, value in document.items() if name not in PeftConfig.model_fields and name not in INERT}
    return [
        f"{CONFIG_FILE}: {name} is {reprlib.repr(value)}: it changes what the adapter does, and only plain LoRA can be imported"
        for name, value in unknown.items()
        if value or (name in SWITCHES and value is not None and value is not False)
    ]
