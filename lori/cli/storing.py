"""The commands that keep a store: list, alias, remove, and moving adapters in and out."""

from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pydantic_core import from_json

from lori.adapter import Adapter
from lori.archive import pack as pack_adapter
from lori.archive import unpack as unpack_adapter
from lori.cli.output import percent, print_json, print_table, say_rounding, size, warn
from lori.cli.places import AdapterArgument, JsonOption, ModelOption, StoreArgument, find_entry, load_model
from lori.config import AdapterConfig, SeededConfig
from lori.errors import AdapterFormatError
from lori.format import CONFIG_FILE, read_config, read_regular
from lori.hub import resolve
from lori.names import check_name
from lori.peft_export import export_peft
from lori.peft_import import import_peft
from lori.store import AdapterStore, Entry
from lori.template import Template
from lori.values import ValueType

NameOption = Annotated[str | None, typer.Option("--name", help="Its name in the store; the source's if absent.")]
ValuesOption = Annotated[
    ValueType | None, typer.Option("--values", help="Store B's values otherwise; says the error made.", show_default=False)
]


def list_(
    store: StoreArgument,
    brief: Annotated[bool, typer.Option("--brief", help="Open no adapter: names, versions and aliases alone.")] = False,
    json: JsonOption = False,
) -> None:
    """List the adapters of a store, every version of each."""
    found = AdapterStore(store)
    aliases = defaultdict(list)
    for alias, entry in found.current().items():
        aliases[entry.folder].append(alias)
    rows = [_listed(entry, aliases[entry.folder], brief) for entry in found.list()]
    if json:
        print_json(rows)
    else:
        columns = ["name", "version", "asked for by"] + (
            [] if brief else ["base", "rank", "kept", "values", "basis", "on disk", "fault"]
        )
        if not any(row.get("fault") for row in rows):
            columns = [column for column in columns if column != "fault"]
        print_table(columns, ([_cell(row, column) for column in columns] for row in rows))
    if any(row.get("fault") for row in rows):
        raise typer.Exit(1)


def _listed(entry: Entry, aliases: list[str], brief: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"name": entry.name, "version": None, "aliases": aliases}
    try:
        row["version"] = entry.version
        if not brief:
            row |= _described(read_config(entry.folder)) | {"bytes": folder_bytes(entry.folder)}
    except AdapterFormatError as error:
        row["fault"] = "; ".join(error.faults)
    return row


def _described(config: AdapterConfig) -> dict[str, Any]:
    return {
        "base": config.base_model_name_or_path,
        "rank": config.r,
        "kept": 1 - config.lori.sparsity,
        "values": config.lori.values,
        "basis": describe_basis(config),
    }


def _cell(row: dict[str, Any], column: str) -> str:
    match column:
        case "asked for by":
            return ", ".join(row["aliases"])
        case "kept":
            return percent(row.get("kept"))
        case "on disk":
            return size(row["bytes"]) if "bytes" in row else ""
        case _:
            return str(row.get(column) or "")


def describe_basis(config: AdapterConfig) -> str:
    """Returns the basis in a few words."""
    basis = config.lori.basis
    return f"seed {basis.seed}, stream {basis.stream}" if isinstance(basis, SeededConfig) else f"its own, {basis.digest[:12]}"


def folder_bytes(folder: Path) -> int:
    """Returns what the files of an adapter's folder hold, in bytes."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def alias(store: StoreArgument, name: str, reference: Annotated[str, typer.Argument(help="name or name@version")]) -> None:
    """Make NAME mean what REFERENCE means now: `alias adapters prod math@1765`; to roll back, `alias adapters math math@1765`."""
    entry = AdapterStore(store).alias(name, reference)
    print(f"{name} means {entry.folder.name}")


def remove(store: StoreArgument, reference: Annotated[str, typer.Argument(help="name, name@version or an alias")]) -> None:
    """Remove a version, or a name with all its versions, or an alias."""
    AdapterStore(store).remove(reference)
    print(f"removed {reference}")


def import_(
    source: Annotated[
        str, typer.Argument(help="A folder, or hf://owner/name[@revision]: of ours, or PEFT's.", show_default=False)
    ],
    store: StoreArgument,
    name: NameOption = None,
    model: ModelOption = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Prune a PEFT adapter's B: the share of its entries to leave out.", show_default=False)
    ] = None,
    values: ValuesOption = None,
    template: Annotated[Template, typer.Option(help="How the adapter's prompts are written.")] = "chat",
) -> None:
    """Import an adapter: check it, and publish it in STORE. The base of a PEFT adapter is the embedded model, or --model."""
    folder = resolve(source)
    name = Path(source).name.partition("@")[0].lower() if name is None else name
    check_name(name)
    if _is_ours(folder):
        if values or sparsity is not None:
            raise typer.BadParameter("--sparsity and --values are for an adapter in PEFT's format; see also `pack --values`")
        entry = AdapterStore(store).publish(folder, name)
        print(f"published {entry.reference}")
        return
    base = load_model(model)
    found = import_peft(folder, base.name, base.identity, name=name, sparsity=sparsity, values=values, templates=(template,))
    if found.ignored:
        warn(f"left out, since no LoRI adapter can hold them: {', '.join(found.ignored)}")
    adapter = found.adapter
    if sparsity is None and adapter.num_kept > adapter.num_entries // 2:
        kept = percent(adapter.num_kept / adapter.num_entries)
        warn(f"{kept} of its B is kept, which is slow to serve: --sparsity 0.9 prunes it")
    if sparsity is not None:
        print(f"pruning changed the delta by {percent(found.error)} of its norm")
    say_rounding(adapter, adapter.config.lori.values)
    entry = AdapterStore(store).add(adapter)
    say_published(entry, adapter)


def _is_ours(folder: Path) -> bool:
    try:
        document = from_json(read_regular(folder, CONFIG_FILE))
    except ValueError as error:
        raise AdapterFormatError(str(folder), [f"{CONFIG_FILE}: JSON: {error}"]) from error
    return isinstance(document, dict) and document.get("peft_type") == "LORI"


def export(
    adapter: AdapterArgument,
    folder: Annotated[Path, typer.Argument(help="Made new, in PEFT's format.", show_default=False)],
    dtype: Annotated[str, typer.Option(help="float32 is exact; bfloat16 and float16 are half as large.")] = "float32",
) -> None:
    """Export an adapter to PEFT's format: A drawn, B dense, for PEFT, vLLM, LoRAX and SGLang."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise typer.BadParameter(f"{dtype!r}, expected one of {', '.join(dtypes)}", param_hint="--dtype")
    export_peft(find_entry(adapter).load(), folder, dtypes[dtype])
    print(f"wrote {folder}: {size(folder_bytes(folder))}")


def pack(
    adapter: AdapterArgument,
    file: Annotated[Path, typer.Argument(help="The file to write.", show_default=False)],
    values: ValuesOption = None,
) -> None:
    """Pack an adapter, with the A that it may have of its own, into one file, to be moved to another machine."""
    entry = find_entry(adapter)
    if values:
        say_rounding(entry.load(), values)
    packed = pack_adapter(entry, file, values)
    print(f"wrote {file}: {packed.name}@{packed.version}, {size(file.stat().st_size)}")


def unpack(
    file: Annotated[Path, typer.Argument(help="What `pack` wrote.", show_default=False)],
    store: StoreArgument,
    name: NameOption = None,
) -> None:
    """Unpack a file that `pack` wrote: check it, and publish it in STORE."""
    print(f"published {unpack_adapter(file, AdapterStore(store), name).reference}")


def say_published(entry: Entry, adapter: Adapter) -> None:
    """Says what `adapter` is called now, and its size."""
    kept = percent(adapter.num_kept / adapter.num_entries)
    print(f"published {entry.reference}: {kept} of B kept, {size(folder_bytes(entry.folder))}")


COMMANDS = (list_, alias, remove, import_, export, pack, unpack)
