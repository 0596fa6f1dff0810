"""Which module may import which: `server -> lori <- training`, no cycles, and one bridge between asyncio and torch."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("lori", "server", "training")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
WEB = {"fastapi", "starlette", "uvicorn", "httpx", "aiohttp", "requests", "flask", "gradio", "prometheus_client", "http", "anyio"}
BRIDGE = "server.engine.thread"
LISTENER = "server.service.answers"
"""It hears several requests at once, in one of asyncio's tasks each: anyio's must not outlive a `yield`."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports_of_source(source: str, module: str) -> set[str]:
    """Returns the full names that `module` imports anywhere in `source`; `from a import b` gives both `a` and `a.b`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *base.split(".")]).rstrip(".")
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


@cache
def imports(module: str) -> frozenset[str]:
    return frozenset(imports_of_source(MODULES[module].read_text(encoding="utf-8"), module))


def roots(module: str) -> set[str]:
    """Returns the top-level packages that `module` imports."""
    return {name.partition(".")[0] for name in imports(module)}


def ours(module: str) -> set[str]:
    """Returns those of our modules that `module` imports; an empty `__init__.py` is no module."""
    return {name for name in imports(module) if name in MODULES and name != module and MODULES[name].stat().st_size}


def in_package(package: str) -> list[str]:
    return [module for module in MODULES if module.split(".")[0] == package]


def test_the_checks_see_all_forms_of_import() -> None:
    source = "import a.b as x, c\nfrom d import e\ndef f():\n    from .g import h\n    from .. import i\nif x:\n    import j"
    found = imports_of_source(source, "server.engine.engine")
    assert found == {"a.b", "c", "d", "d.e", "server.engine.g", "server.engine.g.h", "server", "server.i", "j"}
    assert "server.engine.request" in imports("server.engine.engine")
    assert all(in_package(package) for package in PACKAGES)


@pytest.mark.parametrize("module", in_package("lori"))
def test_lori_knows_tensors_and_files_only(module: str) -> None:
    assert not roots(module) & {"server", "training", "asyncio", *WEB}


@pytest.mark.parametrize("module", in_package("server"))
def test_server_does_not_import_training(module: str) -> None:
    assert "training" not in roots(module)


@pytest.mark.parametrize("module", in_package("training"))
def test_training_does_not_import_server(module: str) -> None:
    assert "server" not in roots(module)


@pytest.mark.parametrize("module", list(MODULES))
def test_no_module_of_the_program_imports_tests(module: str) -> None:
    assert not roots(module) & {"tests", "pytest", "unittest"}


@pytest.mark.parametrize("module", list(MODULES))
def test_asyncio_and_torch_share_no_module(module: str) -> None:
    assert not {"asyncio", "torch"} <= roots(module)


def test_one_bridge_leads_from_asyncio_to_torch() -> None:
    with_asyncio = {module for module in in_package("server") if "asyncio" in roots(module)}
    assert {module for module in with_asyncio if leads_to_torch(module)} == {BRIDGE, LISTENER}
    assert not any("torch" in roots(module) for module in with_asyncio)


def test_who_sends_requests_to_replicas_imports_no_torch() -> None:
    """A cluster's ingresses and the process that started it took 300 MB each for it, and seconds."""
    program = "import sys, server.cluster.deployment; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def leads_to_torch(module: str) -> bool:
    """Whether `module` imports torch, or one of ours that does, at any distance."""
    seen: set[str] = set()
    open_ones = {module}
    while open_ones:
        seen |= open_ones
        open_ones = {name for one in open_ones for name in ours(one)} - seen
    return any("torch" in roots(name) for name in seen)


def test_no_module_imports_itself_by_way_of_others() -> None:
    open_path: list[str] = []
    done: set[str] = set()

    def visit(module: str) -> None:
        assert module not in open_path, " -> ".join([*open_path[open_path.index(module) :], module])
        if module in done:
            return
        open_path.append(module)
        for imported in sorted(ours(module)):
            visit(imported)
        done.add(open_path.pop())

    for module in MODULES:
        visit(module)
    assert done == MODULES.keys()
