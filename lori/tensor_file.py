"""safetensors files as bytes. Never a pickle."""

import os
import re
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load

UNREADABLE = (SafetensorError, KeyError, RuntimeError, TypeError)
"""What reading a file raises: the last three where safetensors holds what torch cannot."""
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""How files of `torch.save` and of `pickle` begin."""
NUM_LENGTH_BYTES = 8
"""At the start of a file: the length of its header."""
MAX_HEADER_BYTES = 100_000_000
"""As safetensors has it."""
TAIL_BYTES = 300
"""The end of a header, where the last tensor's offsets are."""
END = re.compile(rb'"data_offsets"\s*:\s*\[\s*\d+\s*,\s*(\d{1,18})\s*\]')


def parse_tensors(name: str, content: bytes, faults: list[str]) -> dict[str, torch.Tensor] | None:
    """Return the tensors of the file `name` by name, or None and a fault more where it is no safetensors file."""
    try:
        return load(content)
    except UNREADABLE as error:
        faults.append(unreadable_fault(name, content, error))
        return None


def unreadable_fault(name: str, content: bytes, error: Exception) -> str:
    """Return the fault of the file `name` that begins with `content`, in which `error` was found."""
    said = "it is a pickle, which can run any code and is never read" if content.startswith(PICKLES) else error
    return f"{name} is not a safetensors file: {said}"


def first_bytes(path: Path) -> bytes:
    """Return the first bytes of a file; none where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(NUM_LENGTH_BYTES)
    except OSError:
        return b""


def length_fault(name: str, file: BinaryIO) -> str | None:
    """Return what is wrong with how long the file `name` is, which was just opened; None where that is as its header says.

    Reads the header alone, and leaves what else may be wrong with it to `parse_tensors`.
    """
    num_bytes = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(NUM_LENGTH_BYTES), "little")
    if num_bytes < NUM_LENGTH_BYTES or length > num_bytes - NUM_LENGTH_BYTES:
        return f"{name} has {num_bytes} bytes, which end within its header: it was cut short, or is no safetensors file"
    if length > MAX_HEADER_BYTES:
        return f"{name} has a header of {length} bytes, expected {MAX_HEADER_BYTES} at most"
    header, begin = file.read(length), NUM_LENGTH_BYTES + length
    # Most headers end with the offset at which all data ends; searching a whole header takes long.
    tail = END.findall(header, max(0, length - TAIL_BYTES))
    if tail and begin + int(tail[-1]) == num_bytes:
        return None
    expected = begin + max(map(int, END.findall(header)), default=0)
    reason = "it was cut short" if num_bytes < expected else "it has more than its tensors"
    return None if num_bytes == expected else f"{name} has {num_bytes} bytes, expected {expected}: {reason}"
