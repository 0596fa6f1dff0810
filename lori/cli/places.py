"""Which adapter, store or base model an argument means."""

from pathlib import Path
from typing import Annotated

import typer

from lori.base_model import BaseModel, load_base_model, resolve_dtype
from lori.embedded import EMBEDDED_NAME
from lori.errors import AdapterError
from lori.format import CONFIG_FILE, name_of
from lori.store import AdapterStore, Entry

AdapterArgument = Annotated[Path, typer.Argument(help="A folder, or store/name, or store/name@version.", show_default=False)]
AdaptersArgument = Annotated[
    list[Path], typer.Argument(help="Folders, or store/name, or store/name@version.", show_default=False)
]
StoreArgument = Annotated[Path, typer.Argument(help="A folder of adapters.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ModelOption = Annotated[str | None, typer.Option("--model", help="The base model: a local folder or a hub id.")]


def find_entry(path: Path) -> Entry:
    """Returns the adapter at `path`. Raises `AdapterError` where there is none."""
    path = path.absolute()
    if (path / CONFIG_FILE).is_file():
        return Entry(name_of(path), path)
    if path.is_dir():
        raise AdapterError(f"{path} is no adapter: it has no {CONFIG_FILE}")
    if not path.parent.is_dir():
        raise AdapterError(f"{path} is not there, and {path.parent} is no folder of adapters")
    return AdapterStore(path.parent).find(path.name)


def find_entries(path: Path) -> list[Entry]:
    """Returns the adapter at `path`, or all that a store there holds."""
    if path.is_dir() and not (path / CONFIG_FILE).is_file():
        return list(AdapterStore(path.absolute()).list())
    return [find_entry(path)]


def load_model(name: str | None) -> BaseModel:
    """Returns the base model called `name`; `None`, or its own name, is the embedded one. Raises `ModelError`."""
    return load_base_model(None if name == EMBEDDED_NAME else name, resolve_dtype("bfloat16"))
