"""safetensors files as bytes. Never a pickle."""

import torch
from safetensors import SafetensorError
from safetensors.torch import load

UNREADABLE = (SafetensorError, KeyError, RuntimeError, TypeError)
"""What reading a file raises: the last three where safetensors holds what torch cannot."""


def parse_tensors(name: str, content: bytes, faults: list[str]) -> dict[str, torch.Tensor] | None:
    """Returns the tensors of the file `name` by name, or None and a fault more where it is no safetensors file."""
    try:
        return load(content)
    except UNREADABLE as error:
        faults.append(f"{name} is not a safetensors file: {error}")
        return None
