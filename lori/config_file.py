"""`adapter_config.json` as bytes: written with a digest of its own, read with every fault."""

import hashlib
import json

from pydantic import ValidationError

from lori.config import AdapterConfig
from lori.errors import AdapterFormatError

CONFIG_FILE = "adapter_config.json"


def config_digest(content: bytes) -> str:
    """Returns the sha256 (hex) of a config's JSON, its own digest left out: however it is spaced and ordered.

    Raises `ValueError` for what Python's parser does not read.
    """
    document = json.loads(content)
    del document["lori"]["config_digest"]
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def seal_config(source: str, config: AdapterConfig) -> tuple[AdapterConfig, bytes]:
    """Returns `config` with its own digest, and its JSON, which is read again: a copy with changes was never checked.

    Raises `AdapterFormatError`, with `source`, where it is not sound.
    """
    digest = config_digest(config.model_dump_json().encode())
    section = config.lori.model_copy(update={"config_digest": digest})
    content = (config.model_copy(update={"lori": section}).model_dump_json(indent=2) + "\n").encode()
    faults: list[str] = []
    sealed = parse_config(content, faults)
    if sealed is None or faults:
        raise AdapterFormatError(source, faults)
    return sealed, content


def parse_config(content: bytes, faults: list[str]) -> AdapterConfig | None:
    """Returns the config that `content` is, if it is one; whatever is wrong with it is added to `faults`."""
    try:
        config = AdapterConfig.model_validate_json(content)
        found = config_digest(content)
    except ValidationError as error:
        faults += [f"{CONFIG_FILE}: {'.'.join(map(str, e['loc'])) or 'JSON'}: {e['msg']}" for e in error.errors()]
        return None
    except ValueError as error:  # what pydantic's parser takes and Python's does not: a number of 5,000 digits
        faults.append(f"{CONFIG_FILE}: JSON: {error}")
        return None
    if found != config.lori.config_digest:
        faults.append(
            f"{CONFIG_FILE}: its digest is {found}, expected {config.lori.config_digest}: it was changed, or is damaged"
        )
    return config
