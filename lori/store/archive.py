"""Archives: an adapter as one file, to move between machines. Any zip program unpacks an archive to a store with the adapter.

math/adapter_config.json, math/adapter_model.safetensors, math/README.md, math/prompt_statistics.safetensors
.bases/<digest>.safetensors    if the adapter's basis is explicit
"""

import io
import re
import stat
import struct
import zipfile
from functools import partial
from pathlib import Path

from lori.adapter import Adapter
from lori.basis import Explicit
from lori.errors import AdapterError, AdapterFormatError
from lori.format import ADAPTER_FILES, parse_adapter, read_files, stored_as
from lori.names import NAME, check_name, is_name
from lori.sparse import ValueType
from lori.store.bases import BASES_FOLDER, basis_bytes, load_basis, parse_basis
from lori.store.entry import Entry
from lori.store.files import read_regular, replace_file
from lori.store.store import AdapterStore

MAX_BYTES = 2**33
"""Maximum size of an archive."""
MAX_MEMBERS = 5
DIGEST_FILE = re.compile(r"[0-9a-f]{64}\.safetensors")
UNREADABLE = (zipfile.BadZipFile, EOFError, NotImplementedError, OSError, RuntimeError, ValueError, struct.error)
"""Errors that `zipfile` raises for a damaged archive."""
OLDEST = (1980, 1, 1, 0, 0, 0)
"""Time stamp of all members: the earliest that zip can express."""


def pack(folder: Path, file: Path, name: str, values: ValueType | None = None) -> Adapter:
    """Write the adapter in `folder` to the archive `file`, under `name`, and return the adapter.

    `values` is another storage type for B, which makes another version. Equal adapters give equal bytes. Raises
    `AdapterFormatError` if the adapter is not sound, `AdapterError` if `name` is invalid or `file` is no regular file, and
    `OSError` if `file` cannot be written.
    """
    check_name(name)
    file = file.resolve()
    if file.exists() and not file.is_file():
        raise AdapterError(f"{file} is not a regular file")
    faults: list[str] = []
    files = read_files(folder, faults)
    adapter = parse_adapter(name, files, partial(load_basis, folder.parent), source=str(folder), faults=faults)
    if values and values != adapter.config.lori.values:
        sealed = stored_as(adapter, values)
        adapter, files = sealed.adapter, sealed.files  # without card and statistics, which belong to the other version
    members = {f"{name}/{part}": content for part, content in files.items()}
    if isinstance(adapter.basis, Explicit):
        members[f"{BASES_FOLDER}/{adapter.basis.content_digest}.safetensors"] = basis_bytes(adapter.basis)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for member, part in members.items():
            archive.writestr(zipfile.ZipInfo(member, OLDEST), part)
    replace_file(file, content.getvalue())
    return adapter


def unpack(file: Path, store: AdapterStore, name: str | None = None) -> Entry:
    """Publish the adapter in the archive `file` in `store`, under its name in the archive or `name`.

    Raises `AdapterFormatError` if `pack` did not write `file`, or its adapter is not sound; `OSError` if it cannot be read; and
    as `AdapterStore.put`.
    """
    content = read_regular(file, MAX_BYTES)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            packed_name = _checked_name(file, archive.infolist(), len(content))
            members = {member.filename: archive.read(member) for member in archive.infolist()}
    except UNREADABLE as error:
        raise AdapterFormatError(str(file), [f"it is not an archive: {error}"]) from error

    def basis_of(digest: str) -> Explicit:
        member = f"{BASES_FOLDER}/{digest}.safetensors"
        if member not in members:
            raise AdapterFormatError(str(file), [f"{member}: missing"])
        return parse_basis(str(file), members[member], digest)

    files = {member.partition("/")[2]: part for member, part in members.items() if member.startswith(f"{packed_name}/")}
    return store.put(parse_adapter(packed_name if name is None else name, files, basis_of, source=str(file)), files)


def _checked_name(file: Path, members: list[zipfile.ZipInfo], num_bytes: int) -> str:
    """Return the adapter's name in the archive.

    Raises `AdapterFormatError` for any member that `pack` does not write, so no member's path leads out of the folder.
    """
    if len(members) > MAX_MEMBERS:
        raise AdapterFormatError(str(file), [f"it has {len(members)} members, expected {MAX_MEMBERS} at most"])
    names = [member.filename for member in members]
    owners = {name.partition("/")[0] for name in names} - {BASES_FOLDER}
    owner = next(iter(owners), "")
    allowed = {f"{owner}/{name}" for name in ADAPTER_FILES}
    faults = [
        f"{name!r}: unknown member"
        for name in names
        if name not in allowed and not (name.startswith(f"{BASES_FOLDER}/") and DIGEST_FILE.fullmatch(name.partition("/")[2]))
    ]
    faults += [f"{name!r}: there twice" for name in sorted({name for name in names if names.count(name) > 1})]
    faults += [f"{member.filename!r}: compressed" for member in members if member.compress_type != zipfile.ZIP_STORED]
    faults += [f"{member.filename!r}: not a regular file" for member in members if _is_special(member)]
    if len(owners) != 1 or not is_name(owner):
        faults.append(f"it holds {sorted(owners)}, expected one adapter, its name matching {NAME.pattern}")
    if sum(member.file_size for member in members) > num_bytes:  # a zip bomb: members that share bytes
        faults.append(f"its members have more bytes than its {num_bytes}")
    if faults:
        raise AdapterFormatError(str(file), faults)
    return owner


def _is_special(member: zipfile.ZipInfo) -> bool:
    """Return whether a member is a link, a folder or a device by its Unix mode. `pack` and other programs set no mode."""
    kind = stat.S_IFMT(member.external_attr >> 16)
    return kind not in (0, stat.S_IFREG)
