"""Catching up on changes that a server missed. One that cannot be made is logged, and stops no other."""

import logging
from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import pytest

from lori.errors import AdapterFormatError
from server.catalog.admin import AdapterAdmin, catch_up
from server.catalog.files import AdapterFiles
from server.engine.adapters.registry import Registry
from server.errors import ConflictError, StoreError

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class FakeAdmin:
    """An admin that records its calls. It refuses changes of `odd`, and finds no store for `down`."""

    def __init__(self) -> None:
        self.pins = {"kept": "digest"}
        self.calls: list[tuple[str, str]] = []

    async def _do(self, action: str, name: str) -> None:
        if name == "odd":
            raise ConflictError(f"{name} is odd")
        if name == "down":
            raise StoreError("the adapters' folder failed: gone")
        self.calls.append((action, name))

    async def load(self, name: str) -> None:
        await self._do("load", name)

    async def unload(self, name: str) -> None:
        await self._do("unload", name)

    async def pin(self, name: str) -> None:
        await self._do("pin", name)


def fakes(changed: Sequence[str], gone: Sequence[str], error: Exception | None = None) -> tuple[FakeAdmin, AdapterFiles]:
    def changes(_: object) -> tuple[Sequence[str], Sequence[str]]:
        if error:
            raise error
        return changed, gone

    return FakeAdmin(), cast(AdapterFiles, SimpleNamespace(changes=changes))


async def test_missed_changes_are_loaded_and_pinned(caplog: pytest.LogCaptureFixture) -> None:
    admin, files = fakes(["new", "odd", "other"], ["old"])
    with caplog.at_level(logging.WARNING):
        await catch_up(cast(AdapterAdmin, admin), files, Registry([]), ["new", "kept"])
    assert admin.calls == [("unload", "old"), ("load", "new"), ("load", "other"), ("pin", "new")]
    assert caplog.messages == ["'odd' is not as on the other replicas: odd is odd"]


@pytest.mark.parametrize("changed", [["down"], []])
async def test_an_error_of_the_store_is_raised(changed: list[str]) -> None:
    admin, files = fakes(changed, [], None if changed else StoreError("the adapters' folder failed: gone"))
    with pytest.raises(StoreError, match="gone"):
        await catch_up(cast(AdapterAdmin, admin), files, Registry([]), ["math"])
    assert admin.calls == []


async def test_a_store_with_unreadable_names_is_logged_and_pins_are_applied(caplog: pytest.LogCaptureFixture) -> None:
    admin, files = fakes([], [], AdapterFormatError("aliases.json", ["not JSON"]))
    with caplog.at_level(logging.WARNING):
        await catch_up(cast(AdapterAdmin, admin), files, Registry([]), ["math"])
    assert admin.calls == [("pin", "math")]
    assert caplog.messages == ["what was changed meanwhile is not known here: aliases.json is not a sound adapter: not JSON"]
