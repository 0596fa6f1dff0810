"""The tables of a key file, each checked by itself."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from lori.errors import AdapterError
from lori.names import split_reference
from server.schemas.fields import MAX_INT, Weight

KEY_PREFIX = "lori_"
"""Of keys, so that one is known where it should not be."""
MAX_PER_MINUTE = 100_000
"""Each of a minute's requests is remembered."""
WORD = re.compile(rf"(?!{KEY_PREFIX})[A-Za-z0-9][A-Za-z0-9_-]{{0,63}}")
PATTERN = re.compile(r"[a-z0-9._*?\[\]!-]{1,128}")
SHA256 = re.compile(r"[0-9a-f]{64}")


def check_word(value: str) -> str:
    """Returns the name of a tenant or a key. Raises `ValueError` for what cannot be one."""
    # It is not quoted, and neither is a hash: somebody may have put the key there, and this goes to a log.
    if not WORD.fullmatch(value):
        raise ValueError("expected up to 64 letters, digits, - and _, and no key")
    return value


def _pattern(value: str) -> str:
    if not PATTERN.fullmatch(value):
        raise ValueError(f"{value!r} fits no adapter's name, expected a-z, 0-9, '.', '_', '-' and the wildcards *, ?, [abc]")
    return value


def _sha256(value: str) -> str:
    if not SHA256.fullmatch(value):
        raise ValueError("expected 64 hexadecimal digits in lower case, as `python -m server.keys` writes them")
    return value


def _policy(value: dict[str, float]) -> dict[str, float]:
    for reference, weight in value.items():
        try:
            split_reference(reference)
        except AdapterError as error:
            raise ValueError(str(error)) from error
        if not weight:
            raise ValueError(f"{reference!r} has the weight 0, which adds nothing")
    return value


Word = Annotated[str, AfterValidator(check_word)]


class Table(BaseModel):
    """A table of a key file: nothing that is not known, and no value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TenantTable(Table):
    """`[tenants.NAME]`."""

    adapters: list[Annotated[str, AfterValidator(_pattern)]] = ["*"]
    """Patterns of the names of adapters that it may use."""
    policy: Annotated[dict[str, Weight], Field(max_length=16), AfterValidator(_policy)] = {}
    """Adapters that are added to all its requests, and their weights."""
    priority: int = Field(default=0, ge=-1000, le=1000)
    requests_per_minute: int | None = Field(default=None, ge=1, le=MAX_PER_MINUTE)
    max_requests: int | None = Field(default=None, ge=1)
    max_request_s: float | None = Field(default=None, gt=0, le=86400)
    max_request_tokens: int | None = Field(default=None, ge=1, lt=MAX_INT)


class KeyTable(Table):
    """`[[keys]]`."""

    id: Word
    role: Literal["tenant", "admin", "monitor"] = "tenant"
    """Who sends requests; who changes adapters, too; who reads /metrics alone."""
    tenant: Word | None = None
    sha256: Annotated[str, AfterValidator(_sha256)]

    @model_validator(mode="after")
    def _has_its_tenant(self) -> Self:
        if (self.role == "tenant") != (self.tenant is not None):
            raise ValueError(f"the role {self.role!r} {'needs a' if self.tenant is None else 'has no'} tenant")
        return self
