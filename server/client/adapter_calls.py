"""Requests about adapters and named merges, which both clients send. Only an admin's key may change them. Knows no connection."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self
from urllib.parse import quote

from lori.store.files import read_source
from server.client.calls import Call
from server.schemas.adapters import (
    AdapterComparison,
    AdapterDetail,
    AdapterInfo,
    AdapterList,
    NamedMergeInfo,
    WithdrawnReply,
)

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "adapter_config.json", "adapter_model.safetensors", "README.md"
STATISTICS_FILE = "prompt_statistics.safetensors"
MAX_BYTES = 2**34
"""Maximum number of bytes of a file that is sent."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter's files, as bytes: in this server's format, or of a PEFT LoRA."""

    config: bytes
    weights: bytes
    card: bytes | None = None
    prompt_statistics: bytes | None = None

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Return the files of an adapter's folder, which may have no card and no statistics.

        Raises `OSError`, also for a link out of the folder.
        """

        def content(name: str) -> bytes:
            return read_source(Path(folder), name, MAX_BYTES)

        extras = (content(name) if os.path.lexists(Path(folder, name)) else None for name in (CARD_FILE, STATISTICS_FILE))
        return cls(content(CONFIG_FILE), content(WEIGHTS_FILE), *extras)


def adapters(prefix: str, after: str, limit: int | None) -> Call[AdapterList]:
    """List the adapters."""
    params = {"prefix": prefix, "after": after, "limit": "" if limit is None else str(limit)}
    return Call("GET", "/adapters", AdapterList, params={name: value for name, value in params.items() if value})


def adapter(name: str) -> Call[AdapterDetail]:
    """Show the details of an adapter."""
    return Call("GET", path(name), AdapterDetail)


def compare(names: Sequence[str]) -> Call[AdapterComparison]:
    """Compare adapters, each with each."""
    return Call("GET", "/adapters/compare", AdapterComparison, params={"names": ",".join(names)})


def upload(name: str, files: AdapterFiles) -> Call[AdapterInfo]:
    """Upload an adapter."""
    fields = {field: content for field, content in asdict(files).items() if content is not None}
    return Call("POST", "/adapters", AdapterInfo, {"name": name}, files=fields, is_repeatable=False)


def fetch(hub_id: str, name: str | None, revision: str | None) -> Call[AdapterInfo]:
    """Load an adapter from the hub into the server's store."""
    body = {"hub_id": hub_id, "name": name, "revision": revision}
    return Call("POST", "/adapters", AdapterInfo, body, is_repeatable=False)


def delete(name: str) -> Call[WithdrawnReply]:
    """Delete an adapter."""
    return Call("DELETE", path(name), WithdrawnReply, is_repeatable=False)


def unload(name: str) -> Call[WithdrawnReply]:
    """Withdraw an adapter."""
    return Call("POST", f"{path(name)}/unload", WithdrawnReply, is_repeatable=False)


def load(name: str) -> Call[AdapterInfo]:
    """Read an adapter from the server's store."""
    return Call("POST", f"{path(name)}/load", AdapterInfo)


def pin(name: str) -> Call[AdapterInfo]:
    """Keep an adapter resident."""
    return Call("POST", f"{path(name)}/pin", AdapterInfo)


def unpin(name: str) -> Call[AdapterInfo]:
    """Let an adapter be evicted again."""
    return Call("POST", f"{path(name)}/unpin", AdapterInfo)


def alias(name: str, target: str) -> Call[AdapterInfo]:
    """Make a name refer to another adapter."""
    return Call("PUT", f"{path(name)}/alias", AdapterInfo, {"adapter": target})


def merge(name: str) -> Call[NamedMergeInfo]:
    """Show a named merge."""
    return Call("GET", merge_path(name), NamedMergeInfo)


def publish_merge(name: str, merge: Mapping[str, object]) -> Call[NamedMergeInfo]:
    """Publish a named merge."""
    return Call("PUT", merge_path(name), NamedMergeInfo, merge)


def delete_merge(name: str) -> Call[NamedMergeInfo]:
    """Delete a named merge."""
    return Call("DELETE", merge_path(name), NamedMergeInfo, is_repeatable=False)


def path(name: str) -> str:
    """Return the URL path of an adapter, whatever its name."""
    return f"/adapters/{quote(name, safe='@')}"


def merge_path(name: str) -> str:
    """Return the URL path of a named merge, whatever its name."""
    return f"/merges/{quote(name, safe='')}"
