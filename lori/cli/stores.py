"""The commands that manage a store: list, alias, remove."""

from collections import defaultdict
from typing import Annotated, Any

import typer

from lori.cli.arguments import JsonOption, StoreArgument
from lori.cli.output import folder_bytes, percent, print_json, print_table, size
from lori.errors import AdapterError, AdapterFormatError
from lori.format import WEIGHTS_FILE, read_config
from lori.names import name_fault
from lori.store.entry import Entry
from lori.store.store import AdapterStore


def list_(
    store: StoreArgument,
    brief: Annotated[bool, typer.Option("--brief", help="Open no adapter: names, versions and aliases alone.")] = False,
    json: JsonOption = False,
) -> None:
    """List the adapters of a store, every version of each, and what its aliases mean (`verify` reads them whole)."""
    adapter_store = AdapterStore(store)
    rows = [_row(entry, brief) for entry in adapter_store.list()]
    aliases, faults = _aliases(adapter_store)
    faults += [name_fault(store / folder) for folder in adapter_store.misnamed()]
    for row in rows:
        row["aliases"] = aliases[row.pop("folder")]
    if json:
        print_json(rows)
    elif not rows:
        print(f"{store} holds no adapter")
    else:
        columns = ["name", "version"]
        columns += ["aliases"] if any(row["aliases"] for row in rows) else []
        columns += [] if brief else ["base", "rank", "density", "values", "basis", "bytes"]
        columns += ["fault"] if any("fault" in row for row in rows) else []
        print_table(columns, ([_cell(row, column) for column in columns] for row in rows))
    if faults:
        raise AdapterError("; ".join(faults))
    if any("fault" in row for row in rows):
        raise typer.Exit(1)


def _row(entry: Entry, brief: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"name": entry.name, "version": None, "folder": entry.folder.name}
    try:
        row["version"] = entry.version
        if not brief:
            config = read_config(entry.folder)
            row |= {"base": config.base_model_name_or_path, "rank": config.r, "density": round(1 - config.lori.sparsity, 9)}
            row |= {"values": config.lori.values, "basis": str(config.lori.basis), "bytes": folder_bytes(entry.folder)}
            if not (entry.folder / WEIGHTS_FILE).is_file():
                row["fault"] = f"{WEIGHTS_FILE} is missing"
    except AdapterFormatError as error:
        row["fault"] = "; ".join(dict.fromkeys([*error.faults_with_path, *([] if brief else entry.file_faults())]))
    return row


def _aliases(store: AdapterStore) -> tuple[dict[str, list[str]], list[str]]:
    """Return the aliases of each folder, and the faults of aliases that cannot be followed."""
    by_folder, faults = defaultdict(list), []
    for alias in store.alias_names():
        try:
            folder = store.find(alias).folder.name
        except AdapterError as error:
            faults.append(str(error))
        else:
            by_folder[folder].append(alias)
    return by_folder, faults


def _cell(row: dict[str, Any], column: str) -> str:
    match column:
        case "aliases":
            return ", ".join(row["aliases"])
        case "density":
            return percent(row["density"]) if "density" in row else ""
        case "bytes":
            return size(row["bytes"]) if "bytes" in row else ""
        case _:
            return str(row.get(column) or "")


def alias(
    store: StoreArgument,
    name: Annotated[str, typer.Argument(help="The alias.", show_default=False)],
    reference: Annotated[str, typer.Argument(help="name, or name@version.", show_default=False)],
    json: JsonOption = False,
) -> None:
    """Make NAME mean what REFERENCE means now: `alias adapters prod math@1765`; to roll back, `alias adapters math math@1765`."""
    entry = AdapterStore(store).alias(name, reference)
    if json:
        print_json({"alias": name, "means": entry.folder.name})
    else:
        print(f"{name} means {entry.folder.name}")


def remove(
    store: StoreArgument,
    reference: Annotated[str, typer.Argument(help="name, name@version or an alias.", show_default=False)],
    json: JsonOption = False,
) -> None:
    """Remove a version, or a name with all its versions, or an alias."""
    removed = AdapterStore(store).remove(reference)
    if json:
        print_json({"removed": removed})
    else:
        print(f"removed {', '.join(removed)}")


COMMANDS = (list_, alias, remove)
