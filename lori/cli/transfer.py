"""The commands that move adapters in and out: import, export, pack, unpack."""

import os
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from pydantic_core import from_json

from lori.cli.arguments import (
    AdapterArgument,
    JsonOption,
    ModelOption,
    NameOption,
    StoreArgument,
    ValuesOption,
    find_entry,
    identify_base,
)
from lori.cli.output import folder_bytes, percent, print_json, print_made, size, warn
from lori.config import CONFIG_FILE
from lori.errors import AdapterFormatError
from lori.format import read_file
from lori.names import NAME, check_name, is_name
from lori.peft.exporter import export_peft
from lori.peft.importer import import_peft
from lori.prompt_statistics import STATISTICS_FILE
from lori.sparse import rounding_error
from lori.store.archive import pack as pack_adapter
from lori.store.archive import unpack as unpack_adapter
from lori.store.files import read_source
from lori.store.hub import SCHEME, name_in, resolve
from lori.store.store import AdapterStore
from lori.template import Template

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def import_(
    source: Annotated[str, typer.Argument(help="A folder or hf://owner/name[@revision], of ours or PEFT's.", show_default=False)],
    store: StoreArgument,
    name: NameOption = None,
    model: ModelOption = None,
    sparsity: Annotated[
        float | None,
        typer.Option(help="Prune a PEFT adapter's B: the share of its entries to leave out.", show_default=False, min=0, max=1),
    ] = None,
    values: ValuesOption = None,
    template: Annotated[
        Template | None,
        typer.Option(help="How a PEFT adapter's prompts are written; as `export` noted, or chat, if absent.", show_default=False),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Import an adapter: check it, and publish it in STORE. The base of a PEFT adapter is the embedded model, or --model."""
    name = _checked_name(name_in(source)) if name is None else name
    check_name(name)
    is_in_store = not source.startswith(SCHEME) and not Path(source).is_dir() and Path(source).parent.is_dir()
    folder = find_entry(Path(source)).folder if is_in_store else resolve(source)
    if _is_lori(folder):
        if any(option is not None for option in (model, sparsity, values, template)):
            raise typer.BadParameter(
                "--model, --sparsity, --values and --template are for PEFT's format, and this is ours already (see pack --values)"
            )
        entry = AdapterStore(store).publish(folder, name)
        print_made(entry, entry.load(), {}, json)
        return
    if sparsity == 1:
        raise typer.BadParameter("1 leaves nothing, expected less", param_hint="--sparsity")
    if folder.absolute() == store.absolute() / name:
        raise typer.BadParameter(
            f"{folder} is a PEFT LoRA, and stays where it is: pass another STORE, or another --name", param_hint="STORE"
        )
    base = identify_base(model)
    imported = import_peft(
        folder, base, name=name, sparsity=sparsity, values=values, templates=None if template is None else (template,)
    )
    if imported.ignored:
        warn(f"left out, since no LoRI adapter can hold them: {', '.join(imported.ignored)}")
    if sparsity is None and imported.adapter.density > 0.5:
        warn(f"{percent(imported.adapter.density)} of its B is kept, slow to serve: --sparsity prunes, and says what it costs")
    entry = AdapterStore(store).add(imported.adapter)
    notes: dict[str, float | list[str]] = {
        "pruning_error": imported.pruning_error,
        "rounding_error": imported.rounding_error,
        "ignored": list(imported.ignored),
        "templates": list(imported.adapter.config.lori.templates),
    }
    print_made(entry, imported.adapter, notes, json)


def _checked_name(name: str) -> str:
    if not is_name(name):
        raise typer.BadParameter(f"{name!r} cannot be an adapter's name ({NAME.pattern}): give it one", param_hint="--name")
    return name


def _is_lori(folder: Path) -> bool:
    faults: list[str] = []
    content = read_file(folder, CONFIG_FILE, faults, read_source)
    try:
        document = None if content is None else from_json(content)
    except ValueError as error:
        faults.append(f"{CONFIG_FILE}: JSON: {error}")
    if faults:
        raise AdapterFormatError(str(folder), faults)
    return isinstance(document, dict) and document.get("peft_type") == "LORI"


def export(
    adapter: AdapterArgument,
    folder: Annotated[Path, typer.Argument(help="Made new, in PEFT's format.", show_default=False)],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="float32 is exact; the others are half as large, and their A, rounded, is shared no more."),
    ] = "float32",
    json: JsonOption = False,
) -> None:
    """Export an adapter to PEFT's format: A drawn, B dense."""
    export_peft(find_entry(adapter).load(), folder, DTYPES[dtype])
    if json:
        print_json({"folder": str(folder), "bytes": folder_bytes(folder)})
    else:
        print(f"wrote {folder}: {size(folder_bytes(folder))}")


def pack(
    adapter: AdapterArgument,
    file: Annotated[Path, typer.Argument(help="The file to write.", show_default=False, dir_okay=False)],
    name: NameOption = None,
    values: ValuesOption = None,
    json: JsonOption = False,
) -> None:
    """Pack an adapter, with the A that it may have of its own, into one file, to be moved to another machine."""
    entry = find_entry(adapter)
    error = rounding_error(entry.load().modules.values(), values) if values else 0.0
    packed = pack_adapter(entry.folder, file, entry.name if name is None else name, values)
    if packed.version != entry.version and os.path.lexists(entry.folder / STATISTICS_FILE):
        warn(f"{STATISTICS_FILE} belongs to {entry.version}, and was not packed: run python -m training.calibrate again")
    num_bytes = file.stat().st_size
    if json:
        print_json(
            {"name": packed.name, "version": packed.version, "file": str(file), "bytes": num_bytes, "rounding_error": error}
        )
        return
    if error:
        print(f"rounding error: {100 * error:.2g}%")
    print(f"wrote {file}: {packed.name}@{packed.version}, {size(num_bytes)}")


def unpack(
    file: Annotated[Path, typer.Argument(help="What `pack` wrote.", show_default=False, exists=True, dir_okay=False)],
    store: StoreArgument,
    name: NameOption = None,
    json: JsonOption = False,
) -> None:
    """Unpack a file that `pack` wrote: check it, and publish it in STORE."""
    entry = unpack_adapter(file, AdapterStore(store), name)
    print_made(entry, entry.load(), {}, json)


COMMANDS = (import_, export, pack, unpack)
