"""Programs of the kernels' C++ under the address and undefined behaviour sanitizers.

What is compiled stays in the user's cache, by a digest of all that it depends on, until nobody has asked for it for a week.
"""

import fcntl
import hashlib
import os
import subprocess
import time
from functools import cache
from pathlib import Path

from lori.kernels import native
from tests.lori.instruction_sets import FLAGS

SOURCES = Path(native.__file__).parent / "native"
PROGRAMS = Path(__file__).parent / "kernels"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lori-tests" / "sanitized"
WEEK_S = 7 * 24 * 3600

SANITIZE = "-g1 -std=c++17 -Wno-psabi -fsanitize=address,undefined -fno-sanitize-recover=all"
OPTIMIZED = f"{SANITIZE} -O1 -fira-region=one"
AS_WRITTEN = f"{SANITIZE} -O0 --param asan-instrumentation-with-call-threshold=0"
"""Every access as it is written, checked by a call: the kernels unroll so much that a file took half a minute with -O1."""


def sets_with(stem: str) -> list[str]:
    """Return this processor's instruction sets that have a file of their own for `stem`: "expand", "layers" or "product"."""
    return [name for name in native.instruction_sets() if (SOURCES / f"{stem}_{name}.cpp").exists()]


def compile_portable(source: Path) -> Path:
    """Return the object file of `source` for any processor."""
    return _compile(source, OPTIMIZED)


def compile_kernel(stem: str, function: str, instruction_set: str) -> Path:
    """Return the object file of `stem`_`instruction_set`.cpp. Its `function`_`instruction_set` is called `function`_tested."""
    rename = f"-D{function}_{instruction_set}={function}_tested -DLORI_EMULATED_TILES"
    return _compile(SOURCES / f"{stem}_{instruction_set}.cpp", f"{AS_WRITTEN} {FLAGS[instruction_set]} {rename}")


def run_program(folder: Path, *objects: Path) -> str:
    """Link `objects` in `folder`, run the program, which must find nothing, and return what it prints."""
    program = folder / "sanitize"
    subprocess.run(["g++", *SANITIZE.split(), *map(str, objects), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    return done.stdout


def _compile(source: Path, flags: str) -> Path:
    """Return the object file of `source`. Of processes that ask for it at once, one compiles it."""
    digest = hashlib.sha256(f"{source} {flags}".encode() + source.read_bytes() + _surroundings())
    kept = CACHE / f"{source.stem}-{digest.hexdigest()[:32]}.o"
    CACHE.mkdir(parents=True, exist_ok=True)
    with kept.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            unfinished = kept.with_suffix(".unfinished")
            subprocess.run(["g++", *flags.split(), f"-I{SOURCES}", "-c", str(source), "-o", str(unfinished)], check=True)
            unfinished.rename(kept)
        kept.touch()
    return kept


@cache
def _surroundings() -> bytes:
    """Return the headers and what the compiler says it is. Remove what nobody has asked for."""
    if CACHE.exists():
        for old in CACHE.iterdir():
            if old.stat().st_mtime < time.time() - WEEK_S:
                old.unlink()
    compiler = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout
    headers = [header.read_bytes() for folder in (SOURCES, PROGRAMS) for header in sorted(folder.glob("*.h"))]
    return b"".join([compiler, *headers])
