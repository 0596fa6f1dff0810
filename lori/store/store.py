"""A folder of adapters, with versions and aliases. No path ever comes from a request: names are checked, and a folder is no link.

    math@1765747cce63/   one version of `math`, which always does the same; `publish` puts it there
    .aliases/math        "math@1765747cce63": the version that `math` means; another alias is another file
    intent/              an adapter as its maker left it: what `intent` means, until `publish` keeps it as a version
    .bases/              explicit bases, see `lori.store.bases`

Readers need no lock: a version appears and an alias moves by a rename. Writers hold the lock of the name.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from lori.adapter import Adapter
from lori.config import CONFIG_FILE, ExplicitConfig, parse_config
from lori.errors import AdapterError, AdapterFormatError, AliasError
from lori.format import (
    Files,
    Read,
    basis_kept,
    load_adapter,
    name_of,
    parse_adapter,
    read_config,
    read_file,
    read_files,
    save_adapter,
    seal,
)
from lori.names import check_name, name_fault, split_reference, unknown_adapter
from lori.peft.config import peft_fault
from lori.store.aliases import Aliases
from lori.store.bases import BASES_FOLDER, basis_file, load_basis
from lori.store.entry import Entry, Scan, has_adapter, scan
from lori.store.files import (
    FileStamp,
    discard,
    new_folder,
    no_link,
    read_source,
    read_stored,
    remove_folder,
    replace_file,
    sync_folder,
    write_file,
)
from lori.store.locks import locked

NUM_LOOKS = 3
NOT_THERE = "the alias means an adapter that is not there"
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Contents:
    """What the names and aliases of a store mean now."""

    current: Mapping[str, Entry]
    """In order of name; no entry was opened."""
    faults: Mapping[str, str]
    """Of names that mean nothing, or two things, and of folders whose name no adapter may have: what is wrong."""
    brief: Mapping[str, str] = field(default_factory=dict)
    """Of those of `faults` that quote an alias, what is wrong without what it means."""


class AdapterStore:
    """The adapters in the folder `root`, which is made when something is published."""

    grace_s: float = 0
    """How long `remove` should wait after `withdraw`, in seconds, for requests of other processes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._aliases = Aliases(root)
        self._noted: dict[str, tuple[FileStamp | None, AbstractSet[str]]] = {}
        """Of names that were withdrawn, their alias's stamp, and the versions that are to go."""

    def list(self) -> Sequence[Entry]:
        """Return every version of every adapter, in order of name. Opens none.

        One that is a link is among them, and cannot be read. Raises `AdapterError` where `root` cannot be read.
        """
        self._check_root()
        return self._scan().entries

    def versions(self, name: str) -> Sequence[Entry]:
        """Return every version of the adapter called `name`; none where there is none. Raises as `list`."""
        return self._scan(name).entries if self.root.is_dir() else []

    def misnamed(self) -> Sequence[str]:
        """Return the folders that hold an adapter, and whose name no adapter may have. Raises as `list`."""
        return self._scan().misnamed

    def pull(self, *names: str) -> None:
        """Look at what there is of these names now, or of all where none is given: a folder says so whenever it is asked."""

    def may_write(self) -> bool:
        """Return whether anything could be published, as far as that is known beforehand."""
        return os.access(self.root, os.W_OK)

    def alias_names(self) -> Sequence[str]:
        """Return the names of the aliases, whether they mean anything or not."""
        return self._aliases.names()

    def aliases(self) -> dict[str, str]:
        """Return what each alias means, `name@version`. Raises `AdapterError` where one cannot be read."""
        return self._aliases.all()

    def current(self) -> dict[str, Entry]:
        """Return what each name and alias means now. Raises `AdapterError` where one means nothing, or two things."""
        contents = self.contents()
        if contents.faults:
            raise AdapterError("; ".join(contents.faults.values()))
        return dict(contents.current)

    def contents(self) -> Contents:
        """Return what each name and alias means now, and what is wrong with those that mean nothing.

        Raises `AdapterError` where `root` cannot be read, is an adapter itself, or keeps its aliases behind a link.
        """
        for _ in range(NUM_LOOKS - 1):
            if not (found := self._contents()).faults:  # a name that is being removed can look as if it were broken
                return found
        return self._contents()

    def find(self, reference: str) -> Entry:
        """Return the adapter called `reference`: a name, an alias, or `name@version`, where the version's first digits will do.

        Raises `UnknownAdapterError` where there is none, `AdapterError` where it could be several, or no adapter is called so.
        """
        return _settled(partial(self._find, *split_reference(reference)))

    def _check_root(self) -> None:
        if not (self.root / CONFIG_FILE).exists():
            return
        if fault := _peft_fault(self.root, read_source):
            raise AdapterFormatError(str(self.root), [fault])
        raise AdapterError(f"{self.root} is an adapter, expected a folder of adapters: pass the folder that holds it")

    def _contents(self) -> Contents:
        self._check_root()
        found, by_name, aliases = self._scan(), defaultdict(list), dict[str, str]()
        for entry in found.entries:
            by_name[entry.name].append(entry)
        current: dict[str, Entry] = {}
        brief: dict[str, str] = {}
        faults = {name: name_fault(self.root / name) for name in found.misnamed}
        for name in self._aliases.names():
            try:
                if meant := self._aliases.get(name):
                    aliases[name] = meant
            except AliasError as error:
                faults[name], brief[name] = str(error), error.brief
        for name in sorted((aliases.keys() | by_name.keys()) - faults.keys()):
            try:
                current[name] = self._resolve(name, aliases.get(name), by_name[name])
            except AliasError as error:
                faults[name], brief[name] = str(error), error.brief
            except AdapterError as error:
                faults[name] = str(error)
        return Contents(current, faults, brief)

    def _find(self, name: str, version: str) -> Entry:
        if not version:
            alias = self._aliases.get(name)
            is_direct = alias or self._is_plain(name)
            return self._resolve(name, alias, () if is_direct else self.versions(name))
        versions = self.versions(name)
        found = [entry for entry in versions if entry.folder.name.startswith(f"{name}@{version}")]
        if not found:
            found = [entry for entry in versions if entry.folder.name == name and entry.version.startswith(version)]
        if len(found) > 1:
            raise AdapterError(f"{name}@{version} could be {' or '.join(entry.reference for entry in found)}")
        if not found:
            raise unknown_adapter(f"{name}@{version}", self._known())
        return found[0]

    def publish(self, source: Path, name: str | None = None) -> Entry:
        """Check the adapter in `source`, copies it as a version of `name` (`source`'s own if None), and makes `name` mean it.

        Links in `source` are followed as `lori.store.files.source_file` says.

        A crash leaves the name as it was, or as it will be. Raises `AdapterFormatError` where it is not sound, and as `put`.
        """
        faults: list[str] = []
        files = read_files(source, faults, read_source)
        name = name_of(source) if name is None else name
        return self.put(parse_adapter(name, files, partial(load_basis, source.parent), source=str(source), faults=faults), files)

    def add(self, adapter: Adapter) -> Entry:
        """Publish an adapter that was just made, see `lori.format.seal`, under its name. Raises as `seal` and `put`."""
        sealed = seal(adapter)
        return self.put(sealed.adapter, sealed.files)

    def put(self, adapter: Adapter, files: Files) -> Entry:
        """Publish `adapter`, which `files` were read as, under its name.

        Where the store has the version already, its record and card are replaced, unless it was made in another way: it keeps its
        own then. Raises `AdapterError` for a name that is none, or another adapter's alias, and where the store cannot be
        written.
        """
        check_name(adapter.name)
        self._check_root()
        entry = self._entry(adapter.name, f"{adapter.name}@{adapter.version}")
        with locked(self.root, adapter.name):
            meant = self._aliases.get(adapter.name)
            if meant and meant.partition("@")[0] != adapter.name:
                raise AdapterError(f"{adapter.name!r} is an alias of {meant}: remove it first, or take another name")
            self._pin(adapter.name)
            with basis_kept(self.root, adapter.basis):
                self._write(entry.folder, files)
            self._aliases.set(adapter.name, entry.folder.name)
        return entry

    def _write(self, folder: Path, files: Files) -> None:
        if no_link(folder).exists() and not folder.is_dir():
            raise AdapterError(f"{folder} is in the way, and no folder: remove it")
        if not folder.exists():
            with new_folder(folder) as scratch:
                for name, content in files.items():
                    write_file(scratch / name, content)
            return
        # The same content, since the version is: what was measured since, or a copy that was damaged.
        if _is_made_otherwise(folder, files):
            return
        for left in folder.glob(".*@*"):  # by a writer that was killed: a living one would hold the lock
            discard(left)
        for name, content in files.items():
            if read_file(folder, name, []) != content:  # a link is replaced, too
                replace_file(folder / name, content)

    def alias(self, alias: str, reference: str) -> Entry:
        """Make `alias` mean what `reference` means now, and return that.

        Raises as `find`, and `AdapterError` where `alias` is another adapter.
        """
        check_name(alias)
        owner = name_of(self.find(reference).folder)
        # Under the owner's lock too, or what it means could be removed meanwhile.
        with locked(self.root, *{alias, owner}):
            if alias != owner and self.versions(alias):
                raise AdapterError(f"{alias!r} is an adapter: it can only mean one of its own versions")
            version = self.find(reference).version
            self._pin(owner)
            entry = self.find(f"{owner}@{version}")
            self._aliases.set(alias, entry.folder.name)
        return entry

    def doomed(self, reference: str) -> Sequence[Entry]:
        """Return the versions that `remove` would remove now, none for an alias. Raises as that."""
        return self._doomed(*split_reference(reference))[0]

    def withdraw(self, reference: str, versions: Sequence[str] = ()) -> None:
        """Do what has to be done before the requests that use it have ended, when `remove` is called.

        `versions` are those of it, as `name@version`, that the caller knows of: another process may have withdrawn them first.
        Of a folder, what a name means now is noted: if it is published again meanwhile, `remove` leaves what was not there yet.
        """
        name, version = split_reference(reference)
        if not version:
            self._noted[name] = (self._aliases.stamp(name), frozenset(versions))

    def remove(self, reference: str) -> Sequence[str]:
        """Remove a version (`name@version`), a name with all its versions, or an alias alone; returns what is gone.

        An explicit basis that no other adapter needs goes with them.

        Raises `UnknownAdapterError` where there is none, `AdapterError` where an alias still means it.
        """
        name, version = split_reference(reference)
        self._check_is_folder()
        with locked(self.root, name):
            doomed, current = self._doomed(name, version)
            is_back = False
            if noted := None if version else self._noted.pop(name, None):
                stamp, versions = noted
                is_back = self._aliases.stamp(name) != stamp
                doomed = [of for of in doomed if not is_back or (_known_as(of) in versions and of.folder.name != current)]
            gone = {_known_as(entry) for entry in doomed}
            bases = {file for entry in doomed if (file := self._basis_file(entry))}
            # What the name means goes last: a crash leaves the name with fewer versions.
            doomed = sorted(doomed, key=lambda entry: entry.folder.name == current)
            for entry in doomed[:-1]:
                remove_folder(entry.folder)
            if not version and not is_back:
                self._aliases.remove(name)
            for entry in doomed[-1:]:
                remove_folder(entry.folder)
        self._drop(bases)
        return sorted(gone) or [name]

    def save(self, adapter: Adapter) -> Adapter:
        """Save an adapter as its maker leaves it, see `lori.format.save_adapter`, and return it as it is read.

        The explicit basis of what was there before goes, where no other adapter needs it.
        """
        folder = self.root / adapter.name
        before = self._basis_file(Entry(adapter.name, folder))
        saved = save_adapter(adapter, folder)
        with suppress(AdapterError):  # of a folder that cannot be read whole nobody knows what it needs
            self._drop({before} if before else set())
        return saved

    def _drop(self, bases: AbstractSet[Path]) -> None:
        """Remove those of `bases` that no adapter needs; none where something cannot be read, which may need them."""
        if bases and not self.contents().faults:
            with locked(self.root, BASES_FOLDER):
                for file in bases - {self._basis_file(entry) for entry in self.list()}:
                    file.unlink(missing_ok=True)

    def _doomed(self, name: str, version: str) -> tuple[Sequence[Entry], str | None]:
        """Return what goes with `name`, or with its version alone, and what the alias `name` means. Raises as `remove`."""
        self._check_is_folder()
        reference = f"{name}@{version}" if version else name
        doomed = [self.find(reference)] if version else self.versions(name)
        try:
            current = self._aliases.get(name)
        except AdapterError:  # an alias that cannot be read can be removed
            current = ""
        if not version and current and self._is_plain(name):
            self._resolve(name, current, doomed)  # says that the name means two things
        if not doomed and current is None:
            raise unknown_adapter(reference, self._known())
        gone = {_known_as(entry) for entry in doomed}
        meanings = self._aliases.readable()
        holders = {alias: meant for alias, meant in meanings.items() if meant in gone and (version or alias != name)}
        if holders:
            said = ", ".join(f"{alias!r} means {meant}" for alias, meant in holders.items())
            raise AdapterError(f"{said}: move or remove the alias first")
        return doomed, current

    def _check_is_folder(self) -> None:
        if not self.root.is_dir():
            raise AdapterError(f"{self.root} is no folder of adapters")

    def _basis_file(self, entry: Entry) -> Path | None:
        """Return the file of an adapter's explicit basis; None where it has none, or cannot be read."""
        try:
            basis = read_config(entry.folder).lori.basis
        except AdapterFormatError:  # it cannot be loaded either: it needs no basis
            return None
        return basis_file(self.root, basis.digest) if isinstance(basis, ExplicitConfig) else None

    def _scan(self, name: str | None = None) -> Scan:
        return scan(self.root, name)

    def _entry(self, name: str, folder: str) -> Entry:
        return Entry(name, self.root / folder)

    def _has(self, folder: str) -> bool:
        return os.path.isdir(os.path.join(str(self.root), folder))  # a path costs more, in a store of thousands

    def _is_plain(self, name: str) -> bool:
        return has_adapter(os.path.join(str(self.root), name))

    def _resolve(self, name: str, alias: str | None, versions: Sequence[Entry]) -> Entry:
        is_plain = self._is_plain(name)
        if alias and is_plain:
            plain = self.root / name
            keep = f"`python -m lori import {plain} {self.root}` keeps the folder as a version"
            raise AdapterError(f"{name!r} is an alias and a folder of its own in {self.root}: {keep}, or delete the folder")
        if alias and not self._has(alias):
            raise AliasError(f"the alias {name!r} means {alias}, and {self.root} has none", NOT_THERE)
        if alias:
            if (folder := self.root / alias).is_symlink():
                raise AliasError(f"the alias {name!r} means {folder}, which is a link: a store follows none", NOT_THERE)
            return self._entry(name, alias)
        if is_plain:
            no_link(self.root / name)
            return self._entry(name, name)
        if len(versions) > 1:
            raise AdapterError(f"{name!r} could be any of {', '.join(e.folder.name for e in versions)}: publish or alias one")
        if not versions:
            raise unknown_adapter(name, self._known())
        return versions[0]

    def _known(self) -> set[str]:
        return {entry.name for entry in self.list()} | self._aliases.all().keys() if self.root.is_dir() else set()

    def _pin(self, name: str) -> None:
        """Says by an alias what `name` means now, and makes a version of a folder as its maker left it.

        Else a second version, before the alias moves to it, would make the name mean neither.
        """
        plain = Entry(name, self.root / name)
        if not self._is_plain(name):
            if self._aliases.get(name) is None and len(found := self.versions(name)) == 1:
                self._aliases.set(name, found[0].folder.name)
            return
        try:
            kept = Entry(name, self.root / f"{name}@{plain.load().version}")
        except AdapterFormatError as error:
            remedy = "move it to another folder, or take another name" if _peft_fault(plain.folder) else "remove it"
            raise AdapterError(f"{plain.folder} is in the way, and not sound ({'; '.join(error.faults)}): {remedy}") from error
        if kept.folder.exists():
            self._merge_into(kept.folder, plain.folder)
        else:
            plain.folder.rename(kept.folder)
            sync_folder(self.root)
        self._aliases.set(name, kept.folder.name)

    def _merge_into(self, kept: Path, plain: Path) -> None:
        """Keep the files of `plain`, which are newer, in `kept`, which is the same version, and removes it."""
        faults: list[str] = []
        files = read_files(plain, faults)
        others = sorted(path.name for path in plain.iterdir() if path.name not in files)
        if faults or others:
            more = ", ".join(faults or others)
            raise AdapterError(f"{plain} is kept as {kept.name} already, and holds more: {more}; move that first")
        if _is_made_otherwise(kept, files):
            raise AdapterError(f"{plain} does what {kept.name} does, and was made in another way: remove one, or rename it")
        self._write(kept, files)
        remove_folder(plain)


def _settled(look: Callable[[], Found]) -> Found:
    """Return what `look` returns. A name that is being removed can look as if it were broken: it is looked at again."""
    for _ in range(NUM_LOOKS - 1):
        with suppress(AdapterError):
            return look()
    return look()


def _peft_fault(folder: Path, read: Read = read_stored) -> str | None:
    content = read_file(folder, CONFIG_FILE, [], read)
    return peft_fault(content) if content else None


def _known_as(entry: Entry) -> str:
    """Return `name@version`; the folder's name where the version cannot be read."""
    try:
        return entry.reference
    except AdapterFormatError:  # it is to be removed, sound or not
        return entry.folder.name


def _is_made_otherwise(folder: Path, files: Files) -> bool:
    """Return whether a sound adapter in `folder` was made in another way than its equal, `files`: then its record is kept."""
    try:
        before = load_adapter(folder).config
    except AdapterFormatError:  # it is damaged: what is published mends it
        return False
    after = parse_config(files[CONFIG_FILE], [])
    return after is not None and before.lori.training != after.lori.training
