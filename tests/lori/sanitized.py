"""Programs of the kernels' C++ under the address and undefined behaviour sanitizers.

Object files stay in the user's cache, named by a digest of all inputs. Files that were unused for a week are removed.
"""

import fcntl
import hashlib
import os
import subprocess
import time
from functools import cache
from pathlib import Path

from lori import native
from tests.lori.instruction_sets import FLAGS

SOURCES = Path(native.__file__).parent / "kernels" / "native"
PROGRAMS = Path(__file__).parent / "kernels"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lori-tests" / "sanitized"
WEEK_S = 7 * 24 * 3600

SANITIZE = "-g1 -std=c++17 -Wno-psabi -fsanitize=address,undefined -fno-sanitize-recover=all"
OPTIMIZED = f"{SANITIZE} -O1 -fira-region=one"
AS_WRITTEN = f"{SANITIZE} -O0 --param asan-instrumentation-with-call-threshold=0"
"""No optimization, and a call for each checked access. The kernels are unrolled so much that -O1 took half a minute a file."""


def sets_with(stem: str) -> list[str]:
    """Return the instruction sets of this processor that have their own file for `stem`: "expand", "layers" or "product"."""
    return [name for name in native.instruction_sets() if (SOURCES / f"{stem}_{name}.cpp").exists()]


def compile_portable(source: Path) -> Path:
    """Return the object file of `source` for any processor."""
    return _compile(source, OPTIMIZED)


def compile_kernel(stem: str, function: str, instruction_set: str) -> Path:
    """Return the object file of `stem`_`instruction_set`.cpp, with `function`_`instruction_set` renamed to `function`_tested."""
    rename = f"-D{function}_{instruction_set}={function}_tested -DLORI_EMULATED_TILES"
    return _compile(SOURCES / f"{stem}_{instruction_set}.cpp", f"{AS_WRITTEN} {FLAGS[instruction_set]} {rename}")


def run_program(folder: Path, *objects: Path) -> str:
    """Link `objects` in `folder`, run the program, and return its output. The sanitizers must report nothing."""
    program = folder / "sanitize"
    subprocess.run(["g++", *SANITIZE.split(), *map(str, objects), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    return done.stdout


def _compile(source: Path, flags: str) -> Path:
    """Return the object file of `source`. If several processes need it at once, one of them compiles it."""
    digest = hashlib.sha256(f"{source} {flags}".encode() + source.read_bytes() + _surroundings())
    cached = CACHE / f"{source.stem}-{digest.hexdigest()[:32]}.o"
    CACHE.mkdir(parents=True, exist_ok=True)
    with cached.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not cached.exists():
            unfinished = cached.with_suffix(".unfinished")
            subprocess.run(["g++", *flags.split(), f"-I{SOURCES}", "-c", str(source), "-o", str(unfinished)], check=True)
            unfinished.rename(cached)
        cached.touch()
    return cached


@cache
def _surroundings() -> bytes:
    """Return the headers and the compiler's version. Removes files that were unused for a week."""
    if CACHE.exists():
        for old in CACHE.iterdir():
            if old.stat().st_mtime < time.time() - WEEK_S:
                old.unlink()
    compiler = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout
    headers = [header.read_bytes() for folder in (SOURCES, PROGRAMS) for header in sorted(folder.glob("*.h"))]
    return b"".join([compiler, *headers])
