"""Installation: it builds the CPU kernel if there is a compiler, and succeeds without it otherwise."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def wheel(folder: Path, **environment: str) -> Path:
    """Build the package's wheel with the build tools of this environment."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    done = subprocess.run(command, env={"PATH": path} | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [archive] = folder.glob("*.whl")
    return archive


def test_without_a_compiler_the_wheel_has_no_kernel(tmp_path: Path) -> None:
    built = wheel(tmp_path, CXX="/no/such/compiler")
    assert built.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(built).namelist()
    assert "lori/kernels/stacked.py" in names
    assert "server/adapters/math/adapter_model.safetensors" in names
    files = (
        path
        for folder in ("server/playground", "training/recipes", "training/demo")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    )
    assert {str(path.relative_to(ROOT)) for path in files} <= {*names}
    assert not [name for name in names if "_lori_cpu" in name]
    [scripts] = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
    assert re.search(r"^lori-server *= *server\.__main__:main$", zipfile.ZipFile(built).read(scripts).decode(), re.MULTILINE)


def test_with_a_compiler_the_kernel_and_its_types_are_in_the_wheel_and_its_sources_are_not(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("c++") or "g++"} "$@" -O0\n')  # the kernel's speed does not matter here
    compiler.chmod(0o755)
    names = zipfile.ZipFile(wheel(tmp_path, CXX=str(compiler))).namelist()
    assert [name for name in names if re.fullmatch(r"_lori_cpu\..*\.(so|pyd)", name)]
    assert [name for name in names if name.endswith(".pyi")] == ["_lori_cpu.pyi"]
    assert not [name for name in names if name.endswith((".cpp", ".h", "CMakeLists.txt"))]
