"""Withdrawn adapters: freed when their last request has ended, unless they are registered again before."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Any, cast

import anyio
import pytest

from server.catalog.departures import Departures, NameLocks
from server.catalog.uses import AdapterUses
from server.engine.adapters.registry import Registered, Registry
from server.engine.request import AdapterTerm
from server.engine.thread import EngineDeadError, EngineThread
from server.errors import StoreError
from tests.server.engine.adapters.test_registry import adapter as registered

OLD, NEW = registered("math", "1"), registered("math", "2")
ALIAS = registered("prod", "1", f"math@{OLD.summary.version}")


class FakeEngine:
    """An engine that records the dropped adapters."""

    def __init__(self) -> None:
        self.dropped: list[str] = []
        self.is_alive = True
        self.adapter_cache = self

    def drop(self, digest: str) -> None:
        self.dropped.append(digest[0])

    def wake(self) -> None:
        pass

    async def call(self, command: Callable[[Any], None]) -> None:
        if not self.is_alive:
            raise EngineDeadError
        command(self)


class Desk:
    """Departures, and everything that they touch. Records the withdrawn and the removed references."""

    def __init__(self, *adapters: Registered, grace_s: float = 0) -> None:
        self.registry, self.uses, self.engine, self.locks = Registry(adapters), AdapterUses(), FakeEngine(), NameLocks()
        self.removed: list[str] = []
        self.withdrawn: list[str] = []
        self.fault: Exception | None = None
        self.can_withdraw = True
        thread = cast(EngineThread, self.engine)
        self.departures = Departures(self.registry, self.uses, thread, self.locks, self, grace_s)
        self.requests: dict[str, ExitStack] = {}

    def withdraw(self, references: Sequence[str], versions: Sequence[str]) -> None:
        if self.fault and not self.can_withdraw:
            raise self.fault
        assert set(references) <= {*versions, *(version.partition("@")[0] for version in versions)}
        self.withdrawn += references

    def remove(self, references: Sequence[str]) -> None:
        if self.fault:
            raise self.fault
        self.removed += references

    def use(self, request: str, adapter: Registered) -> None:
        """Begin a request that uses an adapter."""
        held = self.requests[request] = ExitStack()
        held.enter_context(self.uses.counted([AdapterTerm(adapter.summary.name, adapter.summary.digest, 1.0)]))

    async def end(self, request: str) -> None:
        self.requests.pop(request).close()
        await anyio.wait_all_tasks_blocked()

    @asynccontextmanager
    async def open(self) -> AsyncIterator["Desk"]:
        async with self.departures.running():
            yield self


def run(test: Callable[[], Any]) -> None:
    async def limited() -> None:
        with anyio.fail_after(60):
            await test()

    anyio.run(limited)


def test_an_unused_adapter_is_freed_at_once() -> None:
    async def test() -> None:
        async with Desk(OLD).open() as desk:
            await desk.departures.begin(desk.registry.withdraw("math"))
            assert desk.engine.dropped == ["1"]
            assert desk.registry.find(OLD.summary.digest, ()) == []

    run(test)


def test_a_used_adapter_is_freed_with_its_last_request() -> None:
    async def test() -> None:
        async with Desk(OLD).open() as desk:
            desk.use("one", OLD)
            desk.use("other", OLD)
            await desk.departures.begin(desk.registry.withdraw("math"))
            assert desk.departures.num_using("math") == 2
            await desk.end("one")
            assert desk.engine.dropped == []
            assert desk.registry.find(OLD.summary.digest, ()) == [OLD], "running requests can still read it"
            await desk.end("other")
            assert desk.engine.dropped == ["1"]
            assert desk.departures.num_using("math") == 0

    run(test)


def test_an_adapter_that_is_registered_again_stays() -> None:
    async def test() -> None:
        async with Desk(OLD).open() as desk:
            desk.use("one", OLD)
            await desk.departures.begin(desk.registry.withdraw("math"))
            desk.registry.put(OLD)
            desk.departures.restore(OLD)
            await desk.end("one")
            assert desk.engine.dropped == []
            assert desk.registry.has("math", OLD.summary.digest)
            desk.use("two", OLD)
            await desk.departures.begin(desk.registry.withdraw("math"))
            await desk.end("two")
            assert desk.engine.dropped == ["1"], "it is freed when it is withdrawn again"

    run(test)


@pytest.mark.parametrize("is_used", [False, True])
def test_content_that_has_another_name_stays_in_memory(is_used: bool) -> None:
    async def test() -> None:
        async with Desk(OLD, ALIAS).open() as desk:
            if is_used:
                desk.use("one", ALIAS)
            await desk.departures.begin(desk.registry.withdraw("math"))
            assert desk.engine.dropped == []
            await desk.departures.begin(desk.registry.withdraw("prod"))
            if is_used:
                assert desk.engine.dropped == []
                await desk.end("one")
            assert desk.engine.dropped == ["1"]

    run(test)


def test_files_that_nobody_uses_are_removed_at_once() -> None:
    async def test() -> None:
        async with Desk(NEW).open() as desk:
            await desk.departures.begin(desk.registry.withdraw("math"))
            await desk.departures.delete("math", [NEW.summary.version, OLD.summary.version], is_whole=True)
            assert desk.removed == ["math"]
            await desk.departures.delete("math", [OLD.summary.version], is_whole=False)
            assert desk.removed == ["math", f"math@{OLD.summary.version}"]

    run(test)


def test_withdrawn_files_stay_for_the_requests_of_other_servers() -> None:
    async def test() -> None:
        async with Desk(OLD, grace_s=3600).open() as desk:
            desk.use("one", OLD)
            await desk.departures.begin(desk.registry.withdraw("math"))
            await desk.departures.delete("math", [OLD.summary.version], is_whole=True)
            assert desk.withdrawn == ["math"], "withdrawn though a request still reads it"
            await desk.end("one")
            assert desk.engine.dropped == ["1"]
            assert desk.removed == []
            assert desk.departures.is_being_deleted(OLD)
        assert desk.removed == ["math"], "nothing is left when the server ends"

    run(test)


def test_files_are_removed_after_the_grace_time() -> None:
    async def test() -> None:
        async with Desk(OLD, grace_s=0.01).open() as desk:
            await desk.departures.begin(desk.registry.withdraw("math"))
            await desk.departures.delete("math", [OLD.summary.version], is_whole=True)
            while not desk.removed:
                await anyio.sleep(0.001)
            assert desk.removed == ["math"]

    run(test)


def test_an_adapter_that_is_registered_again_in_the_grace_time_keeps_its_files() -> None:
    async def test() -> None:
        async with Desk(OLD, grace_s=3600).open() as desk:
            await desk.departures.begin(desk.registry.withdraw("math"))
            await desk.departures.delete("math", [OLD.summary.version, NEW.summary.version], is_whole=True)
            desk.departures.restore(OLD)
        assert desk.removed == [f"math@{NEW.summary.version}"]

    run(test)


def test_an_adapter_that_cannot_be_withdrawn_is_not_being_deleted() -> None:
    async def test() -> None:
        async with Desk(OLD, grace_s=3600).open() as desk:
            desk.fault, desk.can_withdraw = StoreError("no answer"), False
            with pytest.raises(StoreError):
                await desk.departures.delete("math", [OLD.summary.version], is_whole=True)
            assert not desk.departures.is_being_deleted(OLD)
        assert desk.removed == []

    run(test)


def test_files_stay_as_long_as_a_request_reads_them() -> None:
    async def test() -> None:
        async with Desk(OLD).open() as desk:
            desk.use("one", OLD)
            await desk.departures.begin(desk.registry.withdraw("math"))
            await desk.departures.delete("math", [OLD.summary.version], is_whole=True)
            assert desk.departures.is_being_deleted(OLD)
            await anyio.wait_all_tasks_blocked()
            assert desk.removed == []
            desk.requests.pop("one").close()
            while not desk.removed:
                await anyio.sleep(0.001)
            assert desk.removed == ["math"]
            assert not desk.departures.is_being_deleted(OLD)

    run(test)


def test_a_request_for_an_alias_reads_the_files_of_its_target() -> None:
    async def test() -> None:
        async with Desk(OLD, ALIAS).open() as desk:
            desk.use("one", ALIAS)
            for name in ("prod", "math"):
                await desk.departures.begin(desk.registry.withdraw(name))
            await desk.departures.delete("math", [OLD.summary.version], is_whole=True)
            await anyio.wait_all_tasks_blocked()
            assert desk.removed == []
            desk.requests.pop("one").close()
            while not desk.removed:
                await anyio.sleep(0.001)

    run(test)


def test_a_version_that_is_published_meanwhile_stays() -> None:
    async def test() -> None:
        async with Desk(OLD).open() as desk:
            desk.use("one", OLD)
            await desk.departures.begin(desk.registry.withdraw("math"))
            await desk.departures.delete("math", [OLD.summary.version], is_whole=True)
            desk.registry.put(NEW)
            desk.departures.restore(NEW)
            desk.requests.pop("one").close()
            while not desk.removed:
                await anyio.sleep(0.001)
            assert desk.removed == [f"math@{OLD.summary.version}"], "not the name, which has another version again"

    run(test)


def test_the_same_version_that_is_published_meanwhile_stays() -> None:
    async def test() -> None:
        async with Desk(OLD).open() as desk:
            desk.use("one", OLD)
            await desk.departures.begin(desk.registry.withdraw("math"))
            await desk.departures.delete("math", [OLD.summary.version], is_whole=True)
            desk.registry.put(OLD)
            desk.departures.restore(OLD)
            assert not desk.departures.is_being_deleted(OLD)
            await desk.end("one")
        assert desk.removed == []

    run(test)


def test_pending_deletions_are_made_when_the_server_ends() -> None:
    async def test() -> None:
        desk = Desk(OLD)
        async with desk.open():
            desk.use("one", OLD)
            await desk.departures.begin(desk.registry.withdraw("math"))
            await desk.departures.delete("math", [OLD.summary.version], is_whole=True)
        assert desk.removed == ["math"]

    run(test)


def test_pending_deletions_are_made_when_the_server_is_cancelled() -> None:
    async def test() -> None:
        desk = Desk(OLD)
        with anyio.CancelScope() as scope:
            async with desk.open():
                desk.use("one", OLD)
                await desk.departures.begin(desk.registry.withdraw("math"))
                await desk.departures.delete("math", [OLD.summary.version], is_whole=True)
                scope.cancel()
        assert desk.removed == ["math"]

    run(test)


def test_a_dead_engine_has_nothing_to_free() -> None:
    async def test() -> None:
        async with Desk(OLD).open() as desk:
            desk.engine.is_alive = False
            await desk.departures.begin(desk.registry.withdraw("math"))
            assert desk.registry.find(OLD.summary.digest, ()) == []

    run(test)


def test_a_later_deletion_that_fails_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with Desk(OLD).open() as desk:
            desk.use("one", OLD)
            desk.fault = StoreError("the disk is full")
            await desk.departures.begin(desk.registry.withdraw("math"))
            await desk.departures.delete("math", [OLD.summary.version], is_whole=True)
            desk.requests.pop("one").close()
            while not caplog.records:
                await anyio.sleep(0.001)
            assert "'math' was withdrawn, and could not be deleted: the disk is full" in caplog.text
            with pytest.raises(StoreError):
                await desk.departures.delete("math", [OLD.summary.version], is_whole=True)

    run(test)
