"""Arguments that several commands share, and the look-up of the adapter, store or base model that an argument names."""

from pathlib import Path
from typing import Annotated

import typer

from lori.config import CONFIG_FILE
from lori.errors import AdapterError
from lori.format import name_of
from lori.identity import BaseIdentity
from lori.names import NAME, check_name, name_fault
from lori.sparse import ValueType
from lori.store.entry import Entry
from lori.store.store import AdapterStore

AdapterArgument = Annotated[Path, typer.Argument(help="A folder, or store/name, or store/name@version.", show_default=False)]
AdaptersArgument = Annotated[
    list[Path], typer.Argument(help="Folders, or store/name, or store/name@version.", show_default=False)
]
StoresArgument = Annotated[list[Path], typer.Argument(help="Adapters, or stores with all they hold.", show_default=False)]
StoreArgument = Annotated[Path, typer.Argument(help="A folder of adapters.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="The base model: a folder, a hub id, or the embedded model's name.", show_default=False),
]
NameOption = Annotated[
    str | None, typer.Option("--name", help="What to call it; as its source is called if absent.", show_default=False)
]
ValuesOption = Annotated[
    ValueType | None, typer.Option("--values", help="Store B's values otherwise; says the error made.", show_default=False)
]


def find_entry(path: Path) -> Entry:
    """Return the adapter at `path`. Raises `AdapterError` if there is none."""
    path = path.absolute()
    if NAME.fullmatch(path.name) and path.parent.is_dir() and ((path / CONFIG_FILE).is_file() or not path.is_dir()):
        return AdapterStore(path.parent).find(path.name)
    if (path / CONFIG_FILE).is_file():
        return Entry(name_of(path), path)
    if path.is_dir():
        raise AdapterError(f"{path} is no adapter: it has no {CONFIG_FILE}; if it is a store, expected {path}/NAME")
    if not path.parent.is_dir():
        raise AdapterError(f"{path} is not there, and {path.parent} is no folder of adapters")
    return AdapterStore(path.parent).find(path.name)


def check_output(path: Path) -> None:
    """Raise `AdapterError` if `path` is not the store/name of an adapter that can be made."""
    check_name(path.name)
    if path.parent == Path() or (path.is_dir() and not (path / CONFIG_FILE).is_file()):
        raise AdapterError(f"the output is {path}, expected store/name, such as adapters/{path.name}")


def find_entries(path: Path) -> list[Entry]:
    """Return the adapter at `path`, or all adapters of the store at `path`. Raises `AdapterError` if there are none."""
    if not path.is_dir() or (path / CONFIG_FILE).is_file():
        return [find_entry(path)]
    store = AdapterStore(path.absolute())
    if misnamed := store.misnamed():
        raise AdapterError("; ".join(name_fault(path.absolute() / folder) for folder in misnamed))
    entries = list(store.list())
    if not entries:
        raise AdapterError(f"{path} holds no adapter")
    return entries


def identify_base(name: str | None) -> BaseIdentity:
    """Return the identity of the base model `name`. `None` and the embedded model's name mean the embedded model.

    Raises `ModelError`.
    """
    # transformers takes seconds to import, and few commands need it.
    from lori.base_identity import identify_files  # noqa: PLC0415
    from lori.names import EMBEDDED_NAME  # noqa: PLC0415

    return identify_files(None if name == EMBEDDED_NAME else name)
