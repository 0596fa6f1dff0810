"""An adapter that comes from outside as the content of its files, ours or PEFT's: checked whole before any of it is kept."""

from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic_core import from_json

from lori.config_file import CONFIG_FILE
from lori.errors import AdapterFormatError
from lori.format import BasisOf, Files, Sealed, parse_adapter, seal
from lori.identity import BaseIdentity
from lori.peft_import import import_peft


def is_peft(files: Files) -> bool:
    """Says whether the config of `files` is one that PEFT writes for LoRA."""
    try:
        document = from_json(files.get(CONFIG_FILE, b""))
    except ValueError:
        return False
    return isinstance(document, dict) and document.get("peft_type") == "LORA"


def parse_incoming(name: str, files: Files, basis_of: BasisOf, base: BaseIdentity) -> Sealed:
    """Returns the adapter that `files` are, called `name`, and the files to keep: those of ours as they are.

    A PEFT adapter becomes one of ours, exactly. Raises `AdapterFormatError` with every fault, `AdapterError` as `import_peft`.
    """
    if not is_peft(files):
        return Sealed(parse_adapter(name, files, basis_of, base), files)
    with TemporaryDirectory() as place:
        for file, content in files.items():
            (Path(place) / file).write_bytes(content)
        try:
            return seal(import_peft(Path(place), base, name=name).adapter)
        except AdapterFormatError as error:
            raise AdapterFormatError(name, error.faults) from error
