"""The key file: tenants and their keys. It holds hashes of keys, never a key.

[tenants.acme]
adapters = ["math", "acme-*"]
policy = { safety = 0.5 }

[[keys]]
id = "acme-1"
tenant = "acme"
sha256 = "…"
"""

import hashlib
import re
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from lori.errors import AdapterError
from lori.names import split_reference
from lori.printable import printable
from lori.store.files import file_stamp, read_regular
from server.access.caller import Caller
from server.schemas.fields import MAX_INT, Weight

KEY_PREFIX = "lori_"
"""Prefix of every key, so that a leaked key is recognised."""
MAX_PER_MINUTE = 100_000
"""The highest rate limit: the rate limiter remembers each request of the last minute."""
IDENTIFIER = re.compile(rf"(?!{KEY_PREFIX})[A-Za-z0-9][A-Za-z0-9_-]{{0,63}}")
PATTERN = re.compile(r"[a-z0-9._*?\[\]!-]{1,128}")
SHA256 = re.compile(r"[0-9a-f]{64}")


def check_identifier(value: str) -> str:
    """Return `value` if it can be the name of a tenant or of a key. Raises `ValueError` otherwise."""
    # Neither the value nor a hash is quoted: an operator may have put the key there by mistake, and the message goes to a log.
    if not IDENTIFIER.fullmatch(value):
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


Identifier = Annotated[str, AfterValidator(check_identifier)]


class Table(BaseModel):
    """A table of a key file. Unknown fields and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TenantTable(Table):
    """The table `[tenants.NAME]`."""

    adapters: list[Annotated[str, AfterValidator(_pattern)]] = ["*"]
    """Patterns of the adapter names that the tenant may use."""
    policy: Annotated[dict[str, Weight], Field(max_length=16), AfterValidator(_policy)] = {}
    """Adapters that are added to all of the tenant's requests, and their weights."""
    priority: int = Field(default=0, ge=-1000, le=1000)
    requests_per_minute: int | None = Field(default=None, ge=1, le=MAX_PER_MINUTE)
    max_requests: int | None = Field(default=None, ge=1)
    max_request_s: float | None = Field(default=None, gt=0, le=86400)
    max_request_tokens: int | None = Field(default=None, ge=1, lt=MAX_INT)


class KeyTable(Table):
    """The table `[[keys]]`."""

    id: Identifier
    role: Literal["tenant", "admin", "monitor"] = "tenant"
    """A tenant sends requests, an admin also changes adapters and merges, and a monitor only reads /metrics."""
    tenant: Identifier | None = None
    sha256: Annotated[str, AfterValidator(_sha256)]

    @model_validator(mode="after")
    def _has_its_tenant(self) -> Self:
        if (self.role == "tenant") != (self.tenant is not None):
            raise ValueError(f"the role {self.role!r} {'needs a' if self.tenant is None else 'has no'} tenant")
        return self


MAX_BYTES = 1 << 22
NUM_READS, PAUSE_S = 5, 0.1
"""The number of attempts to read a file that changes meanwhile, and the pause between them in seconds."""


class KeyFileError(Exception):
    """A key file is not sound. `lines` has every fault."""

    def __init__(self, source: str, faults: Sequence[str]) -> None:
        self.lines = [printable(line) for line in (f"{source} is not a sound key file:", *(f"  {fault}" for fault in faults))]
        super().__init__(f"{self.lines[0]} {'; '.join(line.strip() for line in self.lines[1:])}")


@dataclass(frozen=True, slots=True)
class Keys:
    """The content of a sound key file."""

    callers: Mapping[str, Caller]
    """Callers by the sha256 of their keys. Keys are random, so the time that the lookup of a hash takes tells nothing about
    them."""
    tenants: Mapping[str, Caller]
    """Every tenant, as a caller without a key."""

    def find(self, key: bytes) -> Caller | None:
        """Return the caller of `key`, or None."""
        return self.callers.get(hashlib.sha256(key).hexdigest())

    def __str__(self) -> str:
        roles = Counter(
            "admin" if caller.is_admin else "monitor" if caller.is_monitor else "tenant" for caller in self.callers.values()
        )
        counts = ", ".join(f"{roles[role]} {role}" for role in ("tenant", "admin", "monitor"))
        return f"tenants: {len(self.tenants)}; keys by role: {counts}"


def read_keys(path: Path) -> Keys:
    """Read a key file while nothing writes it, and return its content. Raises `KeyFileError` with every fault."""
    for attempt in range(NUM_READS):
        if attempt:
            time.sleep(PAUSE_S)
        stamp, content = file_stamp(path), read_key_file(path)
        if file_stamp(path) == stamp:
            return parse_complete_keys(content, str(path))
    raise KeyFileError(str(path), [f"it was changed each of the {NUM_READS} times that it was read"])


def read_key_file(path: Path) -> bytes:
    """Return the bytes of a key file. Raises `KeyFileError` if it cannot be read."""
    try:
        return read_regular(path, MAX_BYTES)
    except OSError as error:
        raise KeyFileError(str(path), [f"it cannot be read: {error.strerror}"]) from error


def parse_complete_keys(content: bytes, source: str) -> Keys:
    """Return the content of a complete key file: it has keys, and its last line ends with a newline.

    A file that was cut at the end of a line passes this check, too. Raises `KeyFileError` with every fault.
    """
    keys = parse_keys(content, source)
    if not keys.callers:
        raise KeyFileError(source, ["it has no [[keys]]: `python -m server.keys` makes one"])
    if not content.endswith(b"\n"):
        raise KeyFileError(source, ["its last line has no end, so this may be half a file: end it with a newline"])
    return keys


def parse_keys(content: bytes, source: str) -> Keys:
    """Return the content of a key file. Raises `KeyFileError` with every fault."""
    try:
        document = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, or lists nested too deeply
        raise KeyFileError(source, [f"it is not TOML: {error}"]) from error
    named, listed = document.get("tenants", {}), document.get("keys", [])
    faults = [f"{name}: unknown, expected tenants and keys" for name in document if name not in ("tenants", "keys")]
    if not isinstance(named, dict) or not isinstance(listed, list):
        raise KeyFileError(source, [*faults, "expected tables [tenants.NAME] and [[keys]]"])
    tenants = {name: table for name, raw in named.items() if (table := _read(TenantTable, raw, f"tenants.{name}", faults))}
    keys = [key for number, raw in enumerate(listed, 1) if (key := _read(KeyTable, raw, _position(number, raw), faults))]
    faults += [*_name_faults(named), *_cross_faults(keys, named)]
    if faults:
        raise KeyFileError(source, faults)
    return _keys(tenants, keys)


T = TypeVar("T", bound=Table)


def _read(kind: type[T], raw: Any, place: str, faults: list[str]) -> T | None:
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        for detail in error.errors():
            message = "unknown field" if detail["type"] == "extra_forbidden" else detail["msg"].removeprefix("Value error, ")
            faults.append(f"{'.'.join([place, *map(str, detail['loc'])])}: {message}")
        return None


def _position(number: int, raw: Any) -> str:
    # The position in the file, and the id if it is a valid one.
    name = raw.get("id") if isinstance(raw, dict) else None
    return f"keys.{number} ({name})" if isinstance(name, str) and IDENTIFIER.fullmatch(name) else f"keys.{number}"


def _name_faults(tenants: Mapping[str, Any]) -> Iterator[str]:
    for name in tenants:
        if not IDENTIFIER.fullmatch(name):
            yield f"tenants: {name!r} is no name, expected up to 64 letters, digits, - and _"


def _cross_faults(keys: Sequence[KeyTable], tenants: Mapping[str, Any]) -> Iterator[str]:
    yield from (
        f"keys ({key.id}): there is no [tenants.{key.tenant}]" for key in keys if key.tenant and key.tenant not in tenants
    )
    yield from (f"keys ({name}): {n} keys have this id" for name, n in Counter(key.id for key in keys).items() if n > 1)
    by_hash: dict[str, list[str]] = {}
    for key in keys:
        by_hash.setdefault(key.sha256, []).append(key.id)
    yield from (f"keys ({', '.join(same)}): have the same sha256" for same in by_hash.values() if len(same) > 1)


def _keys(tables: Mapping[str, TenantTable], keys: Sequence[KeyTable]) -> Keys:
    tenants = {name: _tenant(name, table) for name, table in tables.items()}
    others = {"admin": Caller(is_admin=True, is_monitor=True), "monitor": Caller(is_monitor=True, allowed=())}
    callers = {key.sha256: replace(tenants[key.tenant] if key.tenant else others[key.role], key_id=key.id) for key in keys}
    return Keys(callers, tenants)


def _tenant(name: str, table: TenantTable) -> Caller:
    return Caller(
        tenant=name,
        allowed=tuple(table.adapters),
        policy=tuple(table.policy.items()),
        priority=table.priority,
        requests_per_minute=table.requests_per_minute,
        max_requests=table.max_requests,
        max_request_s=table.max_request_s,
        max_request_tokens=table.max_request_tokens,
    )
