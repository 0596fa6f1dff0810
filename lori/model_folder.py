"""Checks of a base model's folder for missing files, by their names. Opens no weights."""

import json
from pathlib import Path

from lori.config import CONFIG_FILE as ADAPTER_CONFIG

MODEL_CONFIG = "config.json"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
TOKENIZERS = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("spiece.model",),
    ("sentencepiece.bpe.model",),
    ("tekken.json",),
    ("*.tiktoken",),
)
"""Sets of files; a tokenizer needs one set. Without any, transformers silently makes a tokenizer with an empty vocabulary."""
MAX_NAMED = 3
"""Maximum number of missing files that a fault names."""


def folder_fault(folder: Path) -> str | None:
    """Return a fault that names a base model's missing files (except the tokenizer's) and the remedy; None if none is missing."""
    if not folder.is_dir():
        return "there is no such folder: pass one, or a hub id, owner/name"
    if not (folder / MODEL_CONFIG).is_file():
        if (folder / ADAPTER_CONFIG).exists():
            return "it is an adapter and no base model: pass the folder that holds it as --adapters, and its base as --model"
        return f"there is no {folder / MODEL_CONFIG}: {_remedy(folder)}"
    fault = _weights_fault(folder)
    return f"{fault}: {_remedy(folder)}" if fault else None


def tokenizer_fault(folder: Path) -> str | None:
    """Return a fault that names the missing files of the tokenizer, and the remedy. None if no file is missing.

    A few tokenizers need none of these files, so transformers may still load the tokenizer of a folder with a fault.
    """
    for files in TOKENIZERS:
        if all(any(True for _ in folder.glob(file)) for file in files):
            return None
    if (folder / "vocab.json").is_file():
        fault = "there is no tokenizer.json, nor merges.txt beside vocab.json"
    else:
        fault = "there is no tokenizer: no tokenizer.json, tokenizer.model, nor vocab.json with merges.txt"
    return f"{fault}: {_remedy(folder)}"


def _weights_fault(folder: Path) -> str | None:
    if not (folder / WEIGHTS_FILE).is_file() and (folder / INDEX_FILE).is_file():
        parts = _parts(folder / INDEX_FILE)
        missing = [part for part in parts if not (folder / part).is_file()]
        num_more = f" and {len(missing) - MAX_NAMED} more" if missing[MAX_NAMED:] else ""
        return f"weight files are missing: {', '.join(missing[:MAX_NAMED])}{num_more}" if missing else None
    if any(True for pattern in WEIGHTS for _ in folder.glob(pattern)):
        return None
    return f"there are no weights: no {WEIGHTS_FILE}, and no {INDEX_FILE} with its parts"


def _parts(index: Path) -> list[str]:
    try:
        return sorted({str(part) for part in json.loads(index.read_bytes())["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # the loader reports a broken index
        return []


def _remedy(folder: Path) -> str:
    return f"`hf download OWNER/NAME --local-dir {folder}` fetches the missing files"
