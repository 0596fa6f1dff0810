"""A folder of adapters with versions and aliases. Paths never come from a request: names are checked, and links are refused.

    math@1765747cce63/   one immutable version of `math`, written by `publish`
    .aliases/math        "math@1765747cce63": the version that `math` means; every alias is a file
    intent/              an unversioned adapter, as training saves it: `intent` means this folder until `publish` versions it
    .bases/              explicit bases, see `lori.store.bases`

Readers need no lock, since versions and aliases appear by a rename. Writers hold the lock of the name.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from lori.adapter import Adapter
from lori.config import CONFIG_FILE, ExplicitConfig, parse_config
from lori.errors import AdapterError, AdapterFormatError, AliasError
from lori.format import (
    Files,
    Read,
    load_adapter,
    name_of,
    parse_adapter,
    read_config,
    read_file,
    read_files,
    save_adapter,
    seal,
    stored_basis,
)
from lori.names import check_name, name_fault, split_reference, unknown_adapter
from lori.peft.config import peft_fault
from lori.prompt_statistics import STATISTICS_FILE
from lori.store.aliases import Aliases
from lori.store.bases import BASES_FOLDER, basis_file, load_basis
from lori.store.entry import Contents, Entry, Scan, has_adapter, scan
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

NUM_ATTEMPTS = 3
NOT_THERE = "the alias means an adapter that is not there"
Result = TypeVar("Result")


class AdapterStore:
    """The adapters in the folder `root`. Publishing makes the folder if it does not exist."""

    grace_s: float = 0
    """Time between `withdraw` and `remove`, in seconds, for requests of other processes to finish."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._aliases = Aliases(root)
        self._withdrawals: dict[str, tuple[FileStamp | None, AbstractSet[str]]] = {}
        """Stamp of the alias at the withdrawal, and the versions to remove, by name."""

    def list(self) -> Sequence[Entry]:
        """Return every version of every adapter, sorted by name. Opens no adapter.

        Includes links, which cannot be read. Raises `AdapterError` if `root` cannot be read.
        """
        self._check_root()
        return self._scan().entries

    def versions(self, name: str) -> Sequence[Entry]:
        """Return every version of the adapter `name`; empty if there is no such adapter. Raises as `list`."""
        return self._scan(name).entries if self.root.is_dir() else []

    def misnamed(self) -> Sequence[str]:
        """Return the folders that hold an adapter and whose names no adapter may have. Raises as `list`."""
        return self._scan().misnamed

    def pull(self, *names: str) -> None:
        """Refresh the view of these names, or of all names. Does nothing for a local folder, which is always read anew."""

    def may_write(self) -> bool:
        """Return whether the store may be written, as far as this can be known without a write."""
        return os.access(self.root, os.W_OK)

    def alias_names(self) -> Sequence[str]:
        """Return the names of all aliases, also of those that cannot be followed."""
        return self._aliases.names()

    def aliases(self) -> dict[str, str]:
        """Return the target `name@version` of each alias. Raises `AdapterError` if one cannot be read."""
        return self._aliases.all()

    def current(self) -> dict[str, Entry]:
        """Return the entry that each name or alias means now. Raises `AdapterError` if one means nothing or is ambiguous."""
        contents = self.contents()
        if contents.faults:
            raise AdapterError("; ".join(contents.faults.values()))
        return dict(contents.current)

    def contents(self) -> Contents:
        """Return the entry that each name or alias means now, and the faults of the others.

        Raises `AdapterError` if `root` cannot be read or is an adapter itself, or if its folder of aliases is a link.
        """
        for _ in range(NUM_ATTEMPTS - 1):
            if not (contents := self._contents()).faults:  # retried, since a name that is being removed can look broken
                return contents
        return self._contents()

    def find(self, reference: str) -> Entry:
        """Return the entry for `reference`: a name, an alias, or `name@version` with the first digits of the version.

        Raises `UnknownAdapterError` if there is none, `AdapterError` if it is ambiguous or no valid name.
        """
        return _retry(partial(self._find, *split_reference(reference)))

    def _check_root(self) -> None:
        if not (self.root / CONFIG_FILE).exists():
            return
        if fault := _peft_fault(self.root, read_source):
            raise AdapterFormatError(str(self.root), [fault])
        raise AdapterError(f"{self.root} is an adapter, expected a folder of adapters: pass the folder that holds it")

    def _contents(self) -> Contents:
        self._check_root()
        folders, by_name, aliases = self._scan(), defaultdict(list), dict[str, str]()
        for entry in folders.entries:
            by_name[entry.name].append(entry)
        current: dict[str, Entry] = {}
        brief: dict[str, str] = {}
        faults = {name: name_fault(self.root / name) for name in folders.misnamed}
        for name in self._aliases.names():
            try:
                if target := self._aliases.get(name):
                    aliases[name] = target
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
            is_direct = alias or self._is_unversioned(name)
            return self._resolve(name, alias, () if is_direct else self.versions(name))
        versions = self.versions(name)
        matches = [entry for entry in versions if entry.folder.name.startswith(f"{name}@{version}")]
        if not matches:
            matches = [entry for entry in versions if entry.folder.name == name and entry.version.startswith(version)]
        if len(matches) > 1:
            raise AdapterError(f"{name}@{version} could be {' or '.join(entry.reference for entry in matches)}")
        if not matches:
            raise unknown_adapter(f"{name}@{version}", self._known_names())
        return matches[0]

    def publish(self, source: Path, name: str | None = None) -> Entry:
        """Check the adapter in `source`, copy it as a version of `name` (by default that of `source`), and make `name` mean it.

        Links in `source` are followed by the rules of `lori.store.files.source_file`. After a crash the name has its old or its
        new meaning. Raises `AdapterFormatError` if the adapter is not sound, and as `put`.
        """
        faults: list[str] = []
        files = read_files(source, faults, read_source)
        name = name_of(source) if name is None else name
        return self.put(parse_adapter(name, files, partial(load_basis, source.parent), source=str(source), faults=faults), files)

    def add(self, adapter: Adapter) -> Entry:
        """Publish an adapter that is in memory under its name, see `lori.format.seal`. Raises as `seal` and `put`."""
        sealed = seal(adapter)
        return self.put(sealed.adapter, sealed.files)

    def put(self, adapter: Adapter, files: Files) -> Entry:
        """Publish `adapter`, whose files are `files`, under its name.

        If the store has the version already, config, card and statistics are replaced; the statistics alone if the published
        version has another training record. Raises `AdapterError` if the name is invalid or an alias of another adapter, or if
        the store cannot be written.
        """
        check_name(adapter.name)
        self._check_root()
        entry = self._entry(adapter.name, f"{adapter.name}@{adapter.version}")
        with locked(self.root, adapter.name):
            target = self._aliases.get(adapter.name)
            if target and target.partition("@")[0] != adapter.name:
                raise AdapterError(f"{adapter.name!r} is an alias of {target}: remove it first, or take another name")
            self._make_versioned(adapter.name)
            with stored_basis(self.root, adapter.basis):
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
        # The version is the same, so the files differ only in new metrics or statistics, or the published copy is damaged.
        if _has_other_training(folder, files):
            files = {name: content for name, content in files.items() if name == STATISTICS_FILE}
        for leftover in folder.glob(".*@*"):  # from a killed writer, since a living one would hold the lock
            discard(leftover)
        Entry(name_of(folder), folder).remove_unsound_statistics()
        for name, content in files.items():
            if (file := folder / name).is_dir():
                discard(file)
            if read_file(folder, name, []) != content:  # a link is replaced, too
                replace_file(file, content)

    def alias(self, alias: str, reference: str) -> Entry:
        """Make `alias` mean the version that `reference` means now, and return its entry.

        Raises as `find`, and `AdapterError` if `alias` is the name of another adapter.
        """
        check_name(alias)
        owner = name_of(self.find(reference).folder)
        # Also holds the owner's lock, since the target could be removed otherwise.
        with locked(self.root, *{alias, owner}):
            if alias != owner and self.versions(alias):
                raise AdapterError(f"{alias!r} is an adapter: it can only mean one of its own versions")
            version = self.find(reference).version
            self._make_versioned(owner)
            entry = self.find(f"{owner}@{version}")
            self._aliases.set(alias, entry.folder.name)
        return entry

    def removable(self, reference: str) -> Sequence[Entry]:
        """Return the versions that `remove` would remove now; empty for an alias. Raises as `remove`."""
        return self._removable(*split_reference(reference))[0]

    def withdraw(self, reference: str, versions: Sequence[str] = ()) -> None:
        """Prepare the removal of `reference`. Call before the requests that use it have ended, and `remove` after.

        `versions` (as `name@version`) are those that the caller knows, since another process may have withdrawn them first. A
        local folder only records the current state of the name: if the name is published again before `remove`, the new versions
        stay.
        """
        name, version = split_reference(reference)
        if not version:
            self._withdrawals[name] = (self._aliases.stamp(name), frozenset(versions))

    def remove(self, reference: str) -> Sequence[str]:
        """Remove a version (`name@version`), a name with all its versions, or only an alias. Returns the removed references.

        Also removes an explicit basis that no other adapter needs. Raises `UnknownAdapterError` if there is no such adapter,
        `AdapterError` if an alias still means it.
        """
        name, version = split_reference(reference)
        self._check_is_folder()
        with locked(self.root, name):
            entries, current = self._removable(name, version)
            is_republished = False
            if withdrawal := None if version else self._withdrawals.pop(name, None):
                stamp, versions = withdrawal
                is_republished = self._aliases.stamp(name) != stamp
                if is_republished:
                    entries = [e for e in entries if _reference_of(e) in versions and e.folder.name != current]
            removed = {_reference_of(entry) for entry in entries}
            bases = {file for entry in entries if (file := self._basis_file(entry))}
            # The alias's target is removed last: after a crash the name has fewer versions and still works.
            entries = sorted(entries, key=lambda entry: entry.folder.name == current)
            for entry in entries[:-1]:
                remove_folder(entry.folder)
            if not version and not is_republished:
                self._aliases.remove(name)
            for entry in entries[-1:]:
                remove_folder(entry.folder)
        self._remove_unused(bases)
        return sorted(removed) or [name]

    def save(self, adapter: Adapter) -> Adapter:
        """Save an adapter as an unversioned folder, see `lori.format.save_adapter`, and return it as a reader will load it.

        Also removes the explicit basis of the replaced adapter if no other adapter needs it.
        """
        folder = self.root / adapter.name
        old_basis = self._basis_file(Entry(adapter.name, folder))
        saved = save_adapter(adapter, folder)
        with suppress(AdapterError):  # in a store that cannot be read as a whole, it is unknown which bases are in use
            self._remove_unused({old_basis} if old_basis else set())
        return saved

    def _remove_unused(self, bases: AbstractSet[Path]) -> None:
        """Remove the `bases` that no adapter needs. Removes none if the store has faults: a faulty adapter may need them."""
        if bases and not self.contents().faults:
            with locked(self.root, BASES_FOLDER):
                for file in bases - {self._basis_file(entry) for entry in self.list()}:
                    file.unlink(missing_ok=True)

    def _removable(self, name: str, version: str) -> tuple[Sequence[Entry], str | None]:
        """Return all versions of `name`, or the one `version`, and the target of the alias `name`. Raises as `remove`."""
        self._check_is_folder()
        reference = f"{name}@{version}" if version else name
        entries = [self.find(reference)] if version else self.versions(name)
        try:
            current = self._aliases.get(name)
        except AdapterError:  # an alias that cannot be read can be removed
            current = ""
        if not version and current and self._is_unversioned(name):
            self._resolve(name, current, entries)  # raises that the name is ambiguous
        if not entries and current is None:
            raise unknown_adapter(reference, self._known_names())
        references = {_reference_of(entry) for entry in entries}
        targets = self._aliases.readable()
        blocking = {alias: target for alias, target in targets.items() if target in references and (version or alias != name)}
        if blocking:
            listing = ", ".join(f"{alias!r} means {target}" for alias, target in blocking.items())
            raise AdapterError(f"{listing}: move or remove the alias first")
        return entries, current

    def _check_is_folder(self) -> None:
        if not self.root.is_dir():
            raise AdapterError(f"{self.root} is no folder of adapters")

    def _basis_file(self, entry: Entry) -> Path | None:
        """Return the file of an adapter's explicit basis; None if it has none or its config cannot be read."""
        try:
            basis = read_config(entry.folder).lori.basis
        except AdapterFormatError:  # an adapter that cannot be loaded needs no basis
            return None
        return basis_file(self.root, basis.digest) if isinstance(basis, ExplicitConfig) else None

    def _scan(self, name: str | None = None) -> Scan:
        return scan(self.root, name)

    def _entry(self, name: str, folder: str) -> Entry:
        return Entry(name, self.root / folder)

    def _has_folder(self, folder: str) -> bool:
        return os.path.isdir(os.path.join(str(self.root), folder))  # faster than a `Path` in a store of thousands

    def _is_unversioned(self, name: str) -> bool:
        return has_adapter(os.path.join(str(self.root), name))

    def _resolve(self, name: str, alias: str | None, versions: Sequence[Entry]) -> Entry:
        is_unversioned = self._is_unversioned(name)
        if alias and is_unversioned:
            remedy = f"`python -m lori import {self.root / name} {self.root}` keeps the folder as a version"
            raise AdapterError(f"{name!r} is an alias and a folder of its own in {self.root}: {remedy}, or delete the folder")
        if alias and not self._has_folder(alias):
            raise AliasError(f"the alias {name!r} means {alias}, and {self.root} has none", NOT_THERE)
        if alias:
            if (folder := self.root / alias).is_symlink():
                raise AliasError(f"the alias {name!r} means {folder}, which is a link: a store follows none", NOT_THERE)
            return self._entry(name, alias)
        if is_unversioned:
            no_link(self.root / name)
            return self._entry(name, name)
        if len(versions) > 1:
            raise AdapterError(f"{name!r} could be any of {', '.join(e.folder.name for e in versions)}: publish or alias one")
        if not versions:
            raise unknown_adapter(name, self._known_names())
        return versions[0]

    def _known_names(self) -> set[str]:
        return {entry.name for entry in self.list()} | self._aliases.all().keys() if self.root.is_dir() else set()

    def _make_versioned(self, name: str) -> None:
        """Make an unversioned folder called `name` a version, and make sure that an alias `name` exists.

        Without the alias, the name would be ambiguous as soon as a second version is written.
        """
        unversioned = Entry(name, self.root / name)
        if not self._is_unversioned(name):
            if self._aliases.get(name) is None and len(versions := self.versions(name)) == 1:
                self._aliases.set(name, versions[0].folder.name)
            return
        try:
            version = self.root / f"{name}@{unversioned.load().version}"
        except AdapterFormatError as error:
            remedy = "move it to another folder, or take another name" if _peft_fault(unversioned.folder) else "remove it"
            faults = "; ".join(error.faults)
            raise AdapterError(f"{unversioned.folder} is in the way, and not sound ({faults}): {remedy}") from error
        if version.exists():
            self._merge_into(version, unversioned.folder)
        else:
            unversioned.folder.rename(version)
            sync_folder(self.root)
        self._aliases.set(name, version.name)

    def _merge_into(self, version: Path, unversioned: Path) -> None:
        """Move the files of `unversioned`, which are newer, to the folder of the same `version`, and remove `unversioned`."""
        faults: list[str] = []
        files = read_files(unversioned, faults)
        other_files = sorted(path.name for path in unversioned.iterdir() if path.name not in files)
        if faults or other_files:
            listing = ", ".join(faults or other_files)
            raise AdapterError(f"{unversioned} is kept as {version.name} already, and holds more: {listing}; move that first")
        if _has_other_training(version, files):
            raise AdapterError(
                f"{unversioned} does what {version.name} does, and was made in another way: remove one, or rename it"
            )
        self._write(version, files)
        remove_folder(unversioned)


def _retry(call: Callable[[], Result]) -> Result:
    """Return the result of `call`. Retries on `AdapterError`, since a name that is being removed can look broken."""
    for _ in range(NUM_ATTEMPTS - 1):
        with suppress(AdapterError):
            return call()
    return call()


def _peft_fault(folder: Path, read: Read = read_stored) -> str | None:
    content = read_file(folder, CONFIG_FILE, [], read)
    return peft_fault(content) if content else None


def _reference_of(entry: Entry) -> str:
    """Return `name@version`, or the folder's name if the version cannot be read."""
    try:
        return entry.reference
    except AdapterFormatError:  # an adapter that is not sound can be removed, too
        return entry.folder.name


def _has_other_training(folder: Path, files: Files) -> bool:
    """Return whether the sound adapter in `folder` has another training record than `files`, the same version."""
    try:
        published = load_adapter(folder).config
    except AdapterFormatError:  # a damaged adapter is replaced
        return False
    incoming = parse_config(files[CONFIG_FILE], [])
    return incoming is not None and published.lori.training != incoming.lori.training
