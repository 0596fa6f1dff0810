"""Rules of imports: `server -> lori <- training`, the order of the server's packages, no cycles, and one bridge between asyncio
and torch."""

import ast
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("lori", "server", "training")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
WEB = {"fastapi", "starlette", "uvicorn", "httpx", "aiohttp", "requests", "flask", "gradio", "prometheus_client", "http", "anyio"}
BRIDGE = "server.engine.thread"
LISTENER = "server.service.answers"
"""Module that reads several streams at once, each in an asyncio task, since an anyio task group must not outlive a `yield`."""
ORDER = (
    "lori",
    "server.engine",
    "server.schemas",
    "server.affinity",
    "server.transport",
    "server.migration",
    "server.settings",
    "server.arguments",
    "server.access",
    "server.telemetry",
    "server.errors",
    "server.catalog",
    "server.service",
    "server.description",
    "server.routes",
    "server.app",
    "server.served_model",
    "server.loading",
    "server.http_server",
    "server.serving",
    "server.start_checks",
    "server.program",
    "server.__main__",
    "server.keys",
    "server.client",
    "server.plan",
    "server.cluster",
)
"""The packages of the server, and its modules outside of packages, the lowest first. Each imports only from those before it, also
for types. docs/architecture.md describes each."""
PROGRAMS = {"server.plan": {"server.cluster", "ray", "fastapi"}, "server.cluster": {"server.plan", "torch"}}
"""Programs beside the server, each with the modules that it must not import."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports_of_source(source: str, module: str) -> set[str]:
    """Return the full names that `module` imports anywhere in `source`; `from a import b` gives both `a` and `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *base.split(".")]).rstrip(".")
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names


@cache
def imports(module: str) -> frozenset[str]:
    return frozenset(imports_of_source(MODULES[module].read_text(encoding="utf-8"), module))


def roots(module: str) -> set[str]:
    """Return the top-level packages that `module` imports."""
    return {name.partition(".")[0] for name in imports(module)}


def ours(module: str) -> set[str]:
    """Return the modules of this project that `module` imports, without empty `__init__.py` files."""
    return {name for name in imports(module) if name in MODULES and name != module and MODULES[name].stat().st_size}


def in_package(package: str) -> list[str]:
    """Return the modules of `package` and of its subpackages, without empty `__init__.py` files."""
    return [name for name, path in MODULES.items() if f"{name}.".startswith(f"{package}.") and path.stat().st_size]


def test_the_checks_see_all_forms_of_import() -> None:
    source = "import a.b as x, c\nfrom d import e\ndef f():\n    from .g import h\n    from .. import i\nif x:\n    import j"
    names = imports_of_source(source, "server.engine.engine")
    assert names == {"a.b", "c", "d", "d.e", "server.engine.g", "server.engine.g.h", "server", "server.i", "j"}
    assert "server.engine.request" in imports("server.engine.engine")
    assert all(in_package(package) for package in PACKAGES)


def place(module: str) -> int:
    """Return the index of `module`'s package in `ORDER`."""
    [place] = [place for place, package in enumerate(ORDER) if f"{module}.".startswith(f"{package}.")]
    return place


def test_packages_import_only_those_before_them() -> None:
    later = {
        module: f"{ORDER[place(module)]} comes before {', '.join(sorted(ORDER[place(name)] for name in names))}"
        for module in in_package("server")
        if (names := {name for name in ours(module) if place(name) > place(module)})
    }
    assert later == {}


def test_the_order_names_only_existing_modules() -> None:
    assert {ORDER[place(module)] for module in (*in_package("lori"), *in_package("server"))} == {*ORDER}


def test_the_architecture_page_shows_this_order() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.partition("## The server's packages")[2].partition("\n## ")[0]
    names = [name for line in section.splitlines() for name in re.findall("`([a-z_]+)`", line.partition(" | ")[0])]
    assert [f"server.{name}" for name in names] == [name for name in ORDER if name not in ("lori", "server.__main__")]


def importing(names: Collection[str], modules: Iterable[str]) -> dict[str, set[str]]:
    """Return, by module, the top-level packages out of `names` that it imports. Modules that import none are left out."""
    return {module: imported for module in modules if (imported := roots(module) & {*names})}


def test_only_the_cluster_imports_ray() -> None:
    assert importing(["ray"], (module for module in MODULES if not module.startswith("server.cluster."))) == {}


def test_lori_knows_tensors_and_files_only() -> None:
    assert importing({"server", "training", "asyncio", *WEB}, in_package("lori")) == {}


def test_server_and_training_do_not_import_each_other() -> None:
    assert importing(["training"], in_package("server")) == {}
    assert importing(["server"], in_package("training")) == {}


def test_no_module_of_the_program_imports_tests() -> None:
    assert importing(["tests", "pytest", "unittest"], MODULES) == {}


def test_asyncio_and_torch_share_no_module() -> None:
    assert {module for module in MODULES if {"asyncio", "torch"} <= roots(module)} == set()


def test_one_bridge_leads_from_asyncio_to_torch() -> None:
    with_asyncio = {module for module in in_package("server") if "asyncio" in roots(module)}
    assert {module for module in with_asyncio if leads_to_torch(module)} == {BRIDGE, LISTENER}
    assert not any("torch" in roots(module) for module in with_asyncio)


LOADED = """
import os, sys

def print_loaded(modules):
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        return
    for name in modules.split():
        __import__(name)
    print(*sys.modules, flush=True)
    os._exit(0)

cluster, *others = sys.argv[1:]
print_loaded(cluster)
import transformers.modeling_utils
for modules in others:
    print_loaded(modules)
"""
"""Script that prints a line for each argument: the modules loaded after an import of the modules that the argument names. Each
import runs in a forked process; for all but the first one torch and transformers are loaded before the fork."""


@pytest.fixture(scope="module")
def loaded() -> Mapping[str, set[str]]:
    """Return, by program, the modules that are loaded after an import of the program and all of its modules."""
    asked = {package: in_package(package) for package in ("server.cluster", "server.plan")}
    asked["server"] = ["server.program", "server.serving", "server.keys", "server.client"]
    command = [sys.executable, "-c", LOADED, *(" ".join(modules) for modules in asked.values())]
    lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    by_package = {package: {*line.split()} for package, line in zip(asked, lines, strict=True)}
    for package, modules in asked.items():
        assert {*modules} <= by_package[package]
    return by_package


@pytest.mark.slow
@pytest.mark.parametrize("package", PROGRAMS)
def test_cluster_and_planner_are_imported_without_each_other(package: str, loaded: Mapping[str, set[str]]) -> None:
    """Regression: torch cost each ingress of a cluster, and the process that started it, 300 MB and seconds."""
    assert not loaded[package] & PROGRAMS[package]


@pytest.mark.slow
def test_the_server_is_imported_without_the_programs_beside_it(loaded: Mapping[str, set[str]]) -> None:
    assert not loaded["server"] & {*PROGRAMS, "ray"}


def leads_to_torch(module: str) -> bool:
    """Return whether `module` imports torch, directly or through other modules of this project."""
    seen: set[str] = set()
    open_ones = {module}
    while open_ones:
        seen |= open_ones
        open_ones = {name for one in open_ones for name in ours(one)} - seen
    return any("torch" in roots(name) for name in seen)


def test_imports_have_no_cycles() -> None:
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
