"""A store at an address: its contents, its plain folders, and what is wrong in it."""

from pathlib import Path

import fsspec
import pytest

from lori.adapter import Adapter
from lori.basis import Explicit, Seeded
from lori.config import CONFIG_FILE
from lori.errors import AdapterError, AdapterFormatError, UnknownAdapterError, UnreachableError
from lori.format import WEIGHTS_FILE
from tests.lori.adapters import RANK, SHAPES, make_adapter, make_config, make_modules, save, targeted
from tests.lori.remotes import Broken, Open, WatchedFileSystem, let, paths, publish, same


def put_plain(place: Path, name: str, seed: int) -> Adapter:
    """Write an adapter to the address as a plain folder."""
    adapter = save(place / name, make_config(), make_modules(seed=seed))
    for file in (place / name).iterdir():
        fsspec.filesystem("watched").pipe_file(f"/store/{name}/{file.name}", file.read_bytes())
    return adapter


def test_an_adapter_that_one_process_publishes_is_read_by_another(open_store: Open) -> None:
    ours, theirs = open_store(), open_store()
    expected = make_adapter("math")
    entry = ours.add(expected)
    assert paths() == [".aliases/math", f"{entry.folder.name}/{CONFIG_FILE}", f"{entry.folder.name}/{WEIGHTS_FILE}"]
    with pytest.raises(UnknownAdapterError):
        theirs.find("math")
    theirs.pull("math")
    pulled = theirs.find("math")
    assert pulled.reference == entry.reference
    assert pulled.folder != entry.folder
    assert same(pulled.load(), expected)
    assert same(open_store().current()["math"].load(), expected)


def test_a_plain_folder_is_not_lost_in_the_cache(open_store: Open) -> None:
    with pytest.raises(AdapterError, match=r"'math' cannot be saved in .* as its maker leaves it: publish it"):
        open_store().save(make_adapter("math"))
    assert paths() == []


def test_a_plain_folder_is_read_and_read_again(open_store: Open, tmp_path: Path) -> None:
    expected = put_plain(tmp_path, "mine", seed=1)
    store = open_store()
    assert same(store.find("mine").load(), expected)
    changed = put_plain(tmp_path, "mine", seed=2)
    assert same(store.find("mine").load(), expected), "the cached copy was not used"
    store.pull("mine")
    assert same(store.find("mine").load(), changed)
    assert store.find(f"mine@{changed.version}").folder.name == "mine"


def test_a_plain_folder_is_not_published_over(open_store: Open, tmp_path: Path) -> None:
    adapter = put_plain(tmp_path, "mine", seed=1)
    store, before = open_store(), paths()
    message = rf"'mine' is a folder of its own in .*:///store.*: rename it to mine@ and the version \({adapter.version}\) first"
    for act in (lambda: publish(store, "mine"), lambda: store.alias("prod", "mine")):
        with pytest.raises(AdapterError, match=message):
            act()
    assert paths() == before
    store.remove("mine")
    assert paths() == []


def test_an_adapter_is_no_store(open_store: Open, tmp_path: Path) -> None:
    """Regression: it was taken for an empty store, so its server had no adapters, without an error."""
    put_plain(tmp_path, "math", 1)
    WatchedFileSystem.store |= {path.replace("/math", ""): file for path, file in WatchedFileSystem.store.items()}
    with pytest.raises(AdapterError, match="it is an adapter, expected a folder of adapters"):
        open_store()


def test_a_basis_is_fetched_with_its_adapter(open_store: Open, tmp_path: Path) -> None:
    drawn = Seeded(9)
    basis = Explicit.from_tensors({name: drawn.draw(name, RANK, n) for name, (_, n) in targeted(SHAPES).items()})
    expected = save(tmp_path / "own", make_config(basis=drawn), make_modules(), basis)
    open_store().publish(tmp_path / "own")
    store = open_store()
    assert not [*store.root.glob(".bases/*")]
    assert store.find("own").basis(basis.content_digest).content_digest == basis.content_digest
    assert same(open_store().find("own").load(), expected)
    with pytest.raises(AdapterFormatError, match="its basis cannot be read"):
        store.find("own").basis("0" * 64)


@pytest.mark.parametrize(
    "path", ["../out/adapter_config.json", "math@12/../../x", ".aliases/../x", "math@12/.x", ".bases/x", "a/b/c", ".locks/math"]
)
def test_only_files_of_adapters_are_fetched(open_store: Open, path: str, tmp_path: Path) -> None:
    publish(open_store(), "math")
    WatchedFileSystem.store[f"/store/{path}"] = WatchedFileSystem.store["/store/.aliases/math"]
    before = {file for file in tmp_path.rglob("*") if "cache-1" not in file.parts}
    store = open_store()
    assert [*store.contents().current] == ["math"]
    assert not store.contents().faults
    assert not [*store.root.rglob("x")]
    assert {file for file in tmp_path.rglob("*") if "cache-1" not in file.parts} == before


@pytest.mark.parametrize("folder", ["Math", "my run", "math@xyz", "math@0123456789abcd", "auto", "auto@0123456789ab"])
def test_a_folder_with_an_invalid_name_is_reported_and_not_left_out(open_store: Open, folder: str) -> None:
    publish(open_store(), "math")
    WatchedFileSystem.store[f"/store/{folder}/{CONFIG_FILE}"] = WatchedFileSystem.store["/store/.aliases/math"]
    contents = open_store().contents()
    assert [*contents.current] == ["math"]
    rule = "'auto' is reserved" if folder.startswith("auto") else "an adapter's name must match"
    assert rule in contents.faults[folder]


def test_a_version_that_appears_during_the_listing_is_found(open_store: Open) -> None:
    writer = open_store()
    first = publish(writer, "math").reference

    def add(what: str, _: str) -> None:
        if what == "read":  # the listing is done, and the alias is not read yet
            WatchedFileSystem.before = staticmethod(let)
            publish(writer, "math", seed=1)

    WatchedFileSystem.before = add
    assert open_store().current()["math"].reference in {first, writer.find("math").reference}


def test_an_adapter_that_does_not_answer_fails_alone(open_store: Open) -> None:
    writer = open_store()
    for name in ("a", "b"):
        publish(writer, name)
    store = open_store()
    WatchedFileSystem.before = Broken("fetch", f"{store.find('a').folder.name}/{WEIGHTS_FILE}")
    with pytest.raises(UnreachableError, match="fetching failed in the store of the adapters: ConnectionResetError"):
        store.find("a").load()
    assert store.find("b").load().name == "b"
    WatchedFileSystem.before = Broken("list")
    for act in (lambda: store.pull("a"), lambda: publish(store, "c"), lambda: store.remove("b"), open_store):
        with pytest.raises(UnreachableError):
            act()
    assert store.find("b").load().name == "b", "the cached copy was not served"
