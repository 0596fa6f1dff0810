"""An adapter as one file, to be moved between machines: a zip that unpacks, by any program, to a store that holds it.

math/adapter_config.json, math/adapter_model.safetensors, math/README.md
.bases/<digest>.safetensors    where its A is an explicit one
"""

import io
import re
import struct
import tempfile
import zipfile
from pathlib import Path

from lori.adapter import Adapter
from lori.basis import Explicit
from lori.basis_file import BASES_FOLDER, basis_bytes
from lori.durable import replace_file
from lori.errors import AdapterFormatError
from lori.format import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, read_regular, seal, stored_as
from lori.names import NAME
from lori.store import AdapterStore, Entry
from lori.values import ValueType

MAX_BYTES = 2**33
"""What an archive may hold, in bytes."""
DIGEST_FILE = re.compile(r"[0-9a-f]{64}\.safetensors")
UNREADABLE = (zipfile.BadZipFile, EOFError, NotImplementedError, OSError, RuntimeError, ValueError, struct.error)
"""What `zipfile` raises for one that is damaged."""
OLDEST = (1980, 1, 1, 0, 0, 0)


def pack(entry: Entry, file: Path, values: ValueType | None = None) -> Adapter:
    """Writes `entry` to `file` and returns what was written; `values` stores its B otherwise, which is another version.

    The same adapter gives the same bytes. Raises `AdapterFormatError` where it is not sound.
    """
    adapter = entry.load()
    if values is None or values == adapter.config.lori.values:
        files = {name: read_regular(entry.folder, name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
    else:
        sealed = seal(stored_as(adapter, values))
        adapter, files = sealed.adapter, dict(sealed.files)
    if (entry.folder / CARD_FILE).exists():
        files[CARD_FILE] = read_regular(entry.folder, CARD_FILE)
    members = {f"{entry.name}/{name}": content for name, content in files.items()}
    if isinstance(adapter.basis, Explicit):
        members[f"{BASES_FOLDER}/{adapter.basis.content_digest}.safetensors"] = basis_bytes(adapter.basis)
    with tempfile.SpooledTemporaryFile() as scratch:
        with zipfile.ZipFile(scratch, "w") as archive:
            for name, content in members.items():
                archive.writestr(zipfile.ZipInfo(name, OLDEST), content)
        scratch.seek(0)
        replace_file(file, scratch.read())
    return adapter


def unpack(file: Path, store: AdapterStore, name: str | None = None) -> Entry:
    """Publishes what `file` holds in `store`, under its own name or `name`.

    Raises `AdapterFormatError` where it is no archive that `pack` wrote, or holds an adapter that is not sound.
    """
    content = file.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            own = _checked_name(file, archive.infolist())
            members = {member.filename: archive.read(member) for member in archive.infolist()}
    except UNREADABLE as error:
        raise AdapterFormatError(str(file), [f"it is not an archive: {error}"]) from error
    with tempfile.TemporaryDirectory(prefix="lori-") as scratch:
        for member, content in members.items():
            target = Path(scratch) / member
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(content)
        return store.publish(Path(scratch) / own, name)


def _checked_name(file: Path, members: list[zipfile.ZipInfo]) -> str:
    """Returns the adapter's name. Raises where a member is one that `pack` does not write: none leads out of the folder."""
    names = [member.filename for member in members]
    owners = {name.partition("/")[0] for name in names} - {BASES_FOLDER}
    own = next(iter(owners), "")
    allowed = {f"{own}/{name}" for name in (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)}
    faults = [
        f"{name!r}: unknown member"
        for name in names
        if name not in allowed and not (name.startswith(f"{BASES_FOLDER}/") and DIGEST_FILE.fullmatch(name.partition("/")[2]))
    ]
    faults += [f"{name!r}: there twice" for name in sorted({name for name in names if names.count(name) > 1})]
    faults += [f"{member.filename!r}: compressed" for member in members if member.compress_type != zipfile.ZIP_STORED]
    if len(owners) != 1 or not NAME.fullmatch(own):
        faults.append(f"it holds {sorted(owners)}, expected one adapter")
    if (num_bytes := sum(member.file_size for member in members)) > MAX_BYTES:
        faults.append(f"it holds {num_bytes} bytes, expected {MAX_BYTES} at most")
    if faults:
        raise AdapterFormatError(str(file), faults)
    return own
