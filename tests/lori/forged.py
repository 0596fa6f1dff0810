"""Adapters on disk that a test changes and signs again, as a forger would."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from lori.adapter import Adapter
from lori.config import CONFIG_FILE, AdapterConfig, config_digest
from lori.errors import AdapterFormatError
from lori.format import WEIGHTS_FILE, content_digest, load_adapter
from tests.lori.adapters import BASE

Tensors = dict[str, torch.Tensor]
Q = "layers.0.q_proj"  # (9, 5) at rank 3, 27 entries: its mask, a bitmap at this density, has 4 bytes


def load(folder: Path) -> Adapter:
    return load_adapter(folder, BASE)


def load_if_sound(folder: Path) -> Adapter | None:
    """Return the adapter, or `None` if it is refused. Any other error fails the test."""
    try:
        return load(folder)
    except AdapterFormatError:
        return None


def faults_of(folder: Path) -> tuple[str, ...]:
    with pytest.raises(AdapterFormatError) as caught:
        load(folder)
    assert caught.value.source == str(folder)
    return caught.value.faults


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def forge(
    folder: Path, edit: Callable[[Tensors], Any] | None = None, config: Callable[[dict[str, Any]], Any] | None = None
) -> None:
    """Change tensors and config of an adapter in place and give it matching digests, as a forger would."""
    tensors, raw = load_tensors((folder / WEIGHTS_FILE).read_bytes()), json.loads((folder / CONFIG_FILE).read_bytes())
    if edit:
        edit(tensors)
    weights = save_tensors(tensors)
    (folder / WEIGHTS_FILE).write_bytes(weights)
    if config:
        config(raw)
    sign(folder, raw)


def sign(folder: Path, raw: dict[str, Any]) -> None:
    """Give a changed adapter the digests with which it would have been saved."""
    raw["lori"]["content_digest"] = "0" * 64
    config = AdapterConfig.model_validate_json(json.dumps(raw))
    raw["lori"]["content_digest"] = content_digest((folder / WEIGHTS_FILE).read_bytes(), config)
    sign_config(folder, raw)


def sign_config(folder: Path, raw: dict[str, Any]) -> None:
    """Give a changed config the digest of its new content."""
    raw["lori"]["config_digest"] = config_digest(json.dumps(raw).encode())
    (folder / CONFIG_FILE).write_text(json.dumps(raw))


def effect(adapter: Adapter) -> tuple[object, ...]:
    """Return everything that determines an adapter's effect, in a comparable form."""
    modules = {name: (b.mask.tolist(), b.values.tolist()) for name, b in adapter.modules.items()}
    return modules, adapter.version, adapter.basis, adapter.config.r, adapter.config.scale, adapter.config.lori.templates
