"""Adapters packed into one file."""

import io
import os
import stat
import zipfile
from copy import copy
from pathlib import Path

import pytest
import torch

from lori.basis import Explicit, Seeded
from lori.config import CONFIG_FILE
from lori.errors import AdapterError, AdapterFormatError
from lori.format import CARD_FILE, WEIGHTS_FILE, load_adapter
from lori.prompt_statistics import MAX_STATISTICS_BYTES, STATISTICS_FILE
from lori.store.archive import pack, unpack
from lori.store.entry import Entry
from lori.store.store import AdapterStore
from tests.lori.adapters import BASE, RANK, SHAPES, make_config, make_modules, save, targeted, write_statistics


@pytest.fixture
def entry(tmp_path: Path) -> Entry:
    """Return the entry of a sound adapter called math, with a card and statistics."""
    save(tmp_path / "math", make_config(), make_modules())
    (tmp_path / "math" / "README.md").write_text("# math\n")
    write_statistics(tmp_path / "math")
    return Entry("math", tmp_path / "math")


def test_packing_and_unpacking_restores_the_files(entry: Entry, tmp_path: Path) -> None:
    packed = pack(entry.folder, tmp_path / "math.lori", "math")
    unpacked = unpack(tmp_path / "math.lori", AdapterStore(tmp_path / "store"))
    assert unpacked.reference == f"math@{packed.version}"
    assert {f.name: f.read_bytes() for f in unpacked.folder.iterdir()} == {f.name: f.read_bytes() for f in entry.folder.iterdir()}


def test_the_same_adapter_gives_the_same_file(entry: Entry, tmp_path: Path) -> None:
    for name in ("a", "b"):
        pack(entry.folder, tmp_path / name, "math")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_adapter_is_unpacked_under_another_name(entry: Entry, tmp_path: Path) -> None:
    pack(entry.folder, tmp_path / "math.lori", "math")
    assert unpack(tmp_path / "math.lori", AdapterStore(tmp_path / "store"), "law").load(BASE).name == "law"


def test_values_can_be_stored_in_another_type(entry: Entry, tmp_path: Path) -> None:
    packed = pack(entry.folder, tmp_path / "math.lori", "math", "int8")
    unpacked = unpack(tmp_path / "math.lori", AdapterStore(tmp_path / "store")).load(BASE)
    assert unpacked.version == packed.version != entry.version
    assert unpacked.config.lori.values == "int8"
    files = {file.name for file in AdapterStore(tmp_path / "store").find("math").folder.iterdir()}
    assert files == {CONFIG_FILE, WEIGHTS_FILE}, "card and statistics are of another version"
    exact = entry.load()
    for name, b in unpacked.modules.items():
        torch.testing.assert_close(b.values, exact.modules[name].values.float(), rtol=0.02, atol=0.02)


def test_an_archive_includes_an_explicit_basis(tmp_path: Path) -> None:
    basis = Explicit.from_tensors({name: Seeded(9).draw(name, RANK, n) for name, (_, n) in targeted(SHAPES).items()})
    save(tmp_path / "math", make_config(basis=Seeded(9)), make_modules(), basis)
    pack(tmp_path / "math", tmp_path / "math.lori", "math")
    assert unpack(tmp_path / "math.lori", AdapterStore(tmp_path / "store")).load(BASE).basis == basis
    with zipfile.ZipFile(tmp_path / "math.lori") as archive:  # any program can unpack it into a store
        archive.extractall(tmp_path / "by hand")
    assert load_adapter(tmp_path / "by hand" / "math", BASE).basis == basis


@pytest.mark.parametrize(
    "member", ["../math/x", "/etc/x", "math/x", "math/../../x", ".bases/x", ".bases/../x", "law/README.md", "x"]
)
def test_an_archive_with_another_member_is_refused(entry: Entry, tmp_path: Path, member: str) -> None:
    pack(entry.folder, tmp_path / "math.lori", "math")
    with zipfile.ZipFile(tmp_path / "math.lori", "a") as archive:
        archive.writestr(member, "x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(AdapterFormatError):
        unpack(tmp_path / "math.lori", AdapterStore(tmp_path / "store"))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_compressed_member_is_refused(entry: Entry, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            archive.writestr(f"math/{name}", bytes(10_000_000))
    with pytest.raises(AdapterFormatError) as caught:  # no `match`, since the path has the word "compressed", too
        unpack(tmp_path / "bomb", AdapterStore(tmp_path / "store"))
    assert {f"'math/{name}': compressed" for name in (CONFIG_FILE, WEIGHTS_FILE)} <= {*caught.value.faults}
    assert entry.load()


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFDIR])
def test_a_member_that_is_no_regular_file_is_refused(entry: Entry, tmp_path: Path, kind: int) -> None:
    pack(entry.folder, tmp_path / "sound", "math")
    with zipfile.ZipFile(tmp_path / "sound") as sound, zipfile.ZipFile(tmp_path / "file", "w") as archive:
        for member in sound.infolist():
            if not member.filename.endswith(CARD_FILE):
                archive.writestr(member, sound.read(member))
        card = zipfile.ZipInfo(f"math/{CARD_FILE}")
        card.external_attr = (kind | 0o644) << 16
        archive.writestr(card, "../../keys.toml")
    with pytest.raises(AdapterFormatError, match="not a regular file"):
        unpack(tmp_path / "file", AdapterStore(tmp_path / "store"))


@pytest.mark.parametrize("name", ["..", "Math", "math@0123456789ab", ""])
def test_an_archive_of_an_adapter_without_a_sound_name_is_refused(entry: Entry, tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            archive.write(entry.folder / file, f"{name}/{file}")
    with pytest.raises(AdapterFormatError, match="expected one adapter, its name matching"):
        unpack(tmp_path / "x", AdapterStore(tmp_path / "store"), "math")


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("no zip")
    with pytest.raises(AdapterFormatError, match="it is not an archive"):
        unpack(tmp_path / "x", AdapterStore(tmp_path / "store"))


def test_a_damaged_archive_is_refused_or_the_same(entry: Entry, tmp_path: Path) -> None:
    version = pack(entry.folder, tmp_path / "math.lori", "math").version
    whole = (tmp_path / "math.lori").read_bytes()
    loaded = tried = 0
    for at in range(0, len(whole), 13):
        tried += 1
        (tmp_path / "math.lori").write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        try:
            unpacked = unpack(tmp_path / "math.lori", AdapterStore(tmp_path / f"store-{at}"))
        except AdapterError:
            continue
        loaded += 1
        assert unpacked.version == version
    assert loaded < tried / 2


def test_an_adapter_that_could_not_be_unpacked_is_not_packed(entry: Entry, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="'My_Run' is no adapter's name"):
        pack(entry.folder, tmp_path / "x", "My_Run")
    assert not (tmp_path / "x").exists()


def test_a_device_or_the_target_of_a_link_is_not_replaced(entry: Entry, tmp_path: Path) -> None:
    # Regression: packing to /dev/stdout replaced that link.
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AdapterError, match="is not a regular file"):
        pack(entry.folder, tmp_path / "pipe", "math")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    pack(entry.folder, tmp_path / "link", "math")
    assert (tmp_path / "link").is_symlink()
    assert zipfile.is_zipfile(tmp_path / "target")


def test_members_that_share_bytes_are_refused(entry: Entry, tmp_path: Path) -> None:
    # Regression: 4 MB were read as 160 MB, since members contained other members with their headers.
    (entry.folder / "README.md").unlink()
    pack(entry.folder, tmp_path / "x", "math")
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr(f".bases/{'b' * 64}.safetensors", b"b" * 100_000)
    with zipfile.ZipFile(tmp_path / "x", "a") as archive:
        archive.writestr(f".bases/{'a' * 64}.safetensors", inner.getvalue())
        nested = copy(inner_info := zipfile.ZipFile(inner).infolist()[0])
        outer = archive.infolist()[-1]
        nested.header_offset = outer.header_offset + 30 + len(outer.filename) + inner_info.header_offset
        archive.filelist.append(nested)
    with zipfile.ZipFile(tmp_path / "x") as archive:
        assert archive.read(nested.filename) == b"b" * 100_000  # zipfile itself accepts the file
    with pytest.raises(AdapterFormatError, match="its members have more bytes than its"):
        unpack(tmp_path / "x", AdapterStore(tmp_path / "store"))


def test_a_pipe_is_not_unpacked(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        unpack(tmp_path / "pipe", AdapterStore(tmp_path / "store"))


def test_an_archive_with_statistics_that_no_reader_takes_is_refused(entry: Entry, tmp_path: Path) -> None:
    content = (entry.folder / STATISTICS_FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    padding = MAX_STATISTICS_BYTES  # a header may end in spaces
    padded = (length + padding).to_bytes(8, "little") + content[8 : 8 + length] + b" " * padding + content[8 + length :]
    for wrong, fault in ((padded, "expected 1048576 at most"), (content[:-1], "is not a safetensors file")):
        pack(entry.folder, tmp_path / "math.lori", "math")
        with zipfile.ZipFile(tmp_path / "math.lori") as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(tmp_path / "math.lori", "w") as archive:
            for name, part in (members | {f"math/{STATISTICS_FILE}": wrong}).items():
                archive.writestr(name, part)
        with pytest.raises(AdapterFormatError, match=f"{STATISTICS_FILE}: .*{fault}"):
            unpack(tmp_path / "math.lori", AdapterStore(tmp_path / "store"))


def test_an_archive_of_many_members_is_refused_at_once(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        for i in range(5000):
            archive.writestr(f".bases/{i:064x}.safetensors", b"")
    with pytest.raises(AdapterFormatError, match="it has 5000 members, expected 5 at most"):
        unpack(tmp_path / "x", AdapterStore(tmp_path / "store"))
