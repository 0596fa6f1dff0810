"""Parsing and checks of safetensors files from bytes. Never reads a pickle."""

import os
import re
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load

UNREADABLE = (SafetensorError, KeyError, RuntimeError, TypeError)
"""Errors that reading a file raises; the last three are for content that safetensors allows and torch cannot hold."""
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""First bytes of files written by `torch.save` and by `pickle`."""
NUM_LENGTH_BYTES = 8
"""Number of bytes at the start of a file that hold the length of its header."""
MAX_HEADER_BYTES = 100_000_000
"""Maximum length of a header, as in safetensors."""
TAIL_BYTES = 300
"""Number of bytes at the end of a header that are searched for the last tensor's offsets."""
END = re.compile(rb'"data_offsets"\s*:\s*\[\s*\d+\s*,\s*(\d{1,18})\s*\]')


def parse_tensors(name: str, content: bytes, faults: list[str]) -> dict[str, torch.Tensor] | None:
    """Return the tensors in the file `name` by their names. If it is no safetensors file, add a fault and return None."""
    try:
        return load(content)
    except UNREADABLE as error:
        faults.append(unreadable_fault(name, content, error))
        return None


def unreadable_fault(name: str, content: bytes, error: Exception) -> str:
    """Return the fault of the file `name` for a read that raised `error`. `content` is the file's content, or its first bytes."""
    reason = "it is a pickle, which can run any code and is never read" if content.startswith(PICKLES) else error
    return f"{name} is not a safetensors file: {reason}"


def first_bytes(path: Path) -> bytes:
    """Return the first bytes of a file; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(NUM_LENGTH_BYTES)
    except OSError:
        return b""


def length_fault(name: str, file: BinaryIO) -> str | None:
    """Return the fault of a just opened `file` called `name` whose length is not the one in its header; None if it is.

    Reads only the header. Leaves other faults of the header to `parse_tensors`.
    """
    num_bytes = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(NUM_LENGTH_BYTES), "little")
    if num_bytes < NUM_LENGTH_BYTES or length > num_bytes - NUM_LENGTH_BYTES:
        return f"{name} has {num_bytes} bytes, which end within its header: it was cut short, or is no safetensors file"
    if length > MAX_HEADER_BYTES:
        return f"{name} has a header of {length} bytes, expected {MAX_HEADER_BYTES} at most"
    header, begin = file.read(length), NUM_LENGTH_BYTES + length
    # Most headers end with the offset at which the data ends. A search of the whole header is slow, so the tail comes first.
    tail = END.findall(header, max(0, length - TAIL_BYTES))
    if tail and begin + int(tail[-1]) == num_bytes:
        return None
    expected = begin + max(map(int, END.findall(header)), default=0)
    reason = "it was cut short" if num_bytes < expected else "it has more than its tensors"
    return None if num_bytes == expected else f"{name} has {num_bytes} bytes, expected {expected}: {reason}"
