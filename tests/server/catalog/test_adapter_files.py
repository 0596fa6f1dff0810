"""Files of adapters in a server's stores: demo adapters are never changed, and no error shows a path of the machine."""

import errno
import os
from pathlib import Path

import pytest

from lori.base_model import BaseModel
from lori.errors import AdapterError, AdapterFormatError, UnknownAdapterError
from lori.format import WEIGHTS_FILE, read_files
from lori.packed_adapter import PackedReader
from lori.store.store import AdapterStore
from server.catalog.files import AdapterFiles, translated_errors
from server.catalog.fit import Fit
from server.engine.adapters.registry import Registered
from server.errors import ConflictError, StoreError
from server.loading import make_registry
from server.served_model import make_pool
from tests.server.rig import write_adapter


@pytest.fixture
def place(tmp_path: Path, writer: BaseModel) -> Path:
    """Return a folder with two stores: `demo` has math and law, `own` has a math of its own."""
    for name, seed in (("demo/math", 1), ("demo/law", 2), ("own/math", 3)):
        write_adapter(tmp_path / name, writer, seed=seed)
    return tmp_path


@pytest.fixture
def files(place: Path, writer: BaseModel) -> AdapterFiles:
    pool = make_pool(writer, make_registry({}, {}), 4, may_grow=True)
    reader = PackedReader(writer.identity, pool.layouts)
    return AdapterFiles(AdapterStore(place / "own"), AdapterStore(place / "demo"), reader, Fit.from_pool(pool), 1 << 20)


def folder(adapter: Registered) -> str:
    return "/".join(adapter.entry.folder.parts[-2:])


def everything(place: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


def test_an_own_adapter_comes_before_a_demo_adapter_of_its_name(files: AdapterFiles) -> None:
    assert folder(files.read("math").adapter) == "own/math"
    assert folder(files.read("law").adapter) == "demo/law"
    with pytest.raises(UnknownAdapterError):
        files.read("nobody")


def test_demo_adapters_are_never_changed(files: AdapterFiles, place: Path) -> None:
    before = everything(place / "demo")
    for act in (
        lambda: files.versions_to_remove("law"),
        lambda: files.alias("prod", "law"),
        lambda: files.versions_to_remove("law@123"),
    ):
        with pytest.raises(ConflictError, match="is a demo adapter"):
            act()
    files.remove(["law", "law@123"])
    version = files.publish("law", read_files(place / "own" / "math", [])).adapter.summary.version
    assert folder(files.read("law").adapter) == f"own/law@{version}", (
        "the own adapter takes the place of the demo adapter from then on"
    )
    assert files.versions_to_remove("law") == [version]
    files.remove(["law", "math"])
    assert [folder(files.read(name).adapter) for name in ("law", "math")] == ["demo/law", "demo/math"]
    assert everything(place / "demo") == before


def test_an_adapter_is_read_with_its_other_versions(files: AdapterFiles, place: Path) -> None:
    first = files.read("math").adapter.summary.version
    ready = files.publish("math", read_files(place / "demo" / "law", []))
    assert [other.summary.version for other in ready.others] == [first]
    assert folder(ready.others[0]) == f"own/math@{first}", "the author's folder is stored as a version"
    assert files.alias("prod", "math").others == []
    assert [other.summary.version for other in files.others([ready.adapter])[0]] == [first]


def test_changes_by_others_in_the_store_are_found(files: AdapterFiles, place: Path, writer: BaseModel) -> None:
    known = {name: files.read(name).adapter for name in ("math", "law")}
    assert files.changes(known) == ([], []), "a demo adapter is not in the own store"
    others = AdapterStore(place / "own")
    published = files.publish("math", read_files(place / "own" / "math", [])).adapter
    assert files.changes(known) == ([], []), "it is the same version in another folder"
    others.alias("prod", "math")
    assert files.changes({"math": published}) == (["prod"], [])
    write_adapter(place / "drafts" / "math", writer, seed=5)
    newer = files.publish("math", read_files(place / "drafts" / "math", [])).adapter
    assert files.changes(known) == (["math", "prod"], [])
    others.remove("prod")
    others.remove("math")
    assert files.changes(known | {"math": newer}) == ([], ["math"])
    (place / "own" / ".aliases" / "odd").write_text("nothing@0123456789ab")
    assert files.changes(known | {"math": newer}) == ([], ["math"]), "a damaged alias is no change, and hides none"


def test_a_registered_adapter_is_packed_only_if_its_files_are_unchanged(
    files: AdapterFiles, place: Path, writer: BaseModel
) -> None:
    adapter = files.read("math").adapter
    assert files.pack(adapter).version == adapter.summary.version
    write_adapter(place / "own" / "math", writer, seed=4)
    with pytest.raises(ConflictError, match="'math' was changed on disk: load it again"):
        files.pack(adapter)
    with pytest.raises(AdapterFormatError, match="it was changed on disk since the server read of it"):
        files.details.read(adapter)
    write_adapter(place / "own" / "math", writer, seed=3)
    assert files.details.read(adapter).modules
    write_adapter(place / "own" / "math", writer, seed=4)
    with pytest.raises(AdapterFormatError, match="it was changed on disk"):
        files.details.read(adapter)  # otherwise the card would be that of another version
    write_adapter(place / "own" / "math", writer, seed=3)
    (place / "own" / "math" / WEIGHTS_FILE).unlink()
    assert files.details.read(adapter).modules, "the computed details are cached"


@pytest.mark.parametrize(
    ("error", "kind", "pattern"),
    [
        (
            OSError(errno.EROFS, "Read-only file system", "/srv/own/.locks"),
            ConflictError,
            "may not write or read .*: Read-only file system: mount it to be written, .*LORI_ADAPTERS_MODE=rw",
        ),
        (OSError(errno.EACCES, "Permission denied"), ConflictError, "may not write or read .*: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), StoreError, "failed: No space left on device"),
        (OSError(errno.EIO, "Input/output error"), StoreError, "failed: Input/output error"),
        (AdapterError("'math' is in the way in /srv/own/math"), ConflictError, "^'math' is in the way in math$"),
        (AdapterError("/srv/own is no folder of adapters"), ConflictError, "^the store is no folder of adapters$"),
        (AdapterFormatError("/srv/own/math", ["torn"]), AdapterFormatError, "^math is not a sound adapter: torn$"),
        (UnknownAdapterError("math", [], []), UnknownAdapterError, "^there is no adapter 'math'"),
    ],
)
def test_a_refusal_of_a_store_shows_no_path(error: Exception, kind: type[Exception], pattern: str) -> None:
    with pytest.raises(kind, match=pattern) as caught, translated_errors(AdapterStore(Path("/srv/own"))):
        raise error
    assert "/srv" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions keep root out of nothing")
def test_a_folder_that_may_not_be_written_is_a_conflict(files: AdapterFiles, place: Path) -> None:
    (place / "own").chmod(0o500)
    try:
        with pytest.raises(ConflictError, match=r"may not write .*LORI_ADAPTERS_MODE=rw"):
            files.check_writable()
    finally:
        (place / "own").chmod(0o700)


def test_a_damaged_alias_neither_hides_changes_nor_counts_as_deleted(files: AdapterFiles, place: Path) -> None:
    """Regression: one unreadable alias kept a replica from learning of any change."""
    known = {name: files.read(name).adapter for name in ("math", "law")}
    store = AdapterStore(place / "own")
    store.publish(place / "demo" / "law", "new")
    (place / "own" / ".aliases" / "math").write_text("nothing of the kind")
    (place / "own" / ".aliases" / "odd").write_text("nothing of the kind")
    assert files.changes(known) == (["new"], [])
