"""Slow grammars of one client: other clients' grammars are neither refused nor delayed for long."""

import asyncio
import json
import socket
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import cast

import httpx
import pytest
from starlette.requests import ClientDisconnect

from server.engine.admission import Admission
from server.engine.generate_request import RefusedError
from server.engine.grammar import CrowdedError, Grammar
from server.service.grammar_checks import MAX_PER_TENANT, GrammarChecks
from tests.server.forked import start_forked
from tests.server.keyed import ACME, OTHER, bearer, write_keys
from tests.server.live import LIMIT_S, Live, wait_until

USUAL, SLOW = Grammar("regex", "[0-9]+"), Grammar("regex", "slow")


async def stays() -> bool:
    return False


@dataclass
class FakeAdmission:
    """A fake admission that knows the grammars it has checked. The check of a slow grammar blocks until a test sets `may_end`."""

    is_checking: threading.Event = field(default_factory=threading.Event)
    may_end: threading.Event = field(default_factory=threading.Event)
    checked: list[Grammar] = field(default_factory=list)

    def knows_grammar(self, grammar: Grammar) -> bool:
        return grammar in self.checked

    def check_grammar(self, grammar: Grammar, *, is_quick: bool = False) -> bool:
        is_slow = grammar.text.startswith("slow")
        if is_slow and is_quick:
            return False
        if is_slow:
            self.is_checking.set()
            assert self.may_end.wait(LIMIT_S)
        if grammar.text == "slow and bad":
            raise RefusedError("grammar", "is bad")
        self.checked.append(grammar)
        return True


@pytest.fixture
def admission() -> FakeAdmission:
    return FakeAdmission()


@pytest.fixture
def checks(admission: FakeAdmission) -> GrammarChecks:
    return GrammarChecks(cast(Admission, admission))


def run(test: Coroutine[object, object, None]) -> None:
    asyncio.run(asyncio.wait_for(test, LIMIT_S))


async def begin_slow(checks: GrammarChecks, admission: FakeAdmission, number: int, tenant: str) -> list[asyncio.Task[None]]:
    """Begin the checks of slow grammars, and wait until the first is under way."""
    begun = [asyncio.create_task(checks.check(Grammar("regex", f"slow {i}"), tenant, stays)) for i in range(number)]
    await asyncio.to_thread(admission.is_checking.wait, LIMIT_S)
    return begun


@pytest.mark.parametrize("tenant", ["", "other"])
def test_a_quick_grammar_overtakes_slow_ones(checks: GrammarChecks, admission: FakeAdmission, tenant: str) -> None:
    async def test() -> None:
        slow = await begin_slow(checks, admission, MAX_PER_TENANT, "hostile" if tenant else "")
        await checks.check(USUAL, tenant, stays)
        assert admission.checked == [USUAL]
        admission.may_end.set()
        await asyncio.gather(*slow)

    run(test())


def test_without_keys_no_grammar_is_refused_because_others_wait(checks: GrammarChecks, admission: FakeAdmission) -> None:
    async def test() -> None:
        slow = await begin_slow(checks, admission, 100, "")
        last = asyncio.create_task(checks.check(SLOW, "", stays))
        admission.may_end.set()
        await asyncio.gather(last, *slow)
        assert admission.checked[-1] == SLOW, "first come, first served"

    run(test())


def test_a_tenant_has_its_share_of_places_and_no_more(checks: GrammarChecks, admission: FakeAdmission) -> None:
    async def test() -> None:
        slow = await begin_slow(checks, admission, MAX_PER_TENANT, "hostile")
        with pytest.raises(CrowdedError, match=f"{MAX_PER_TENANT} grammars of tenant 'hostile'"):
            await checks.check(USUAL, "hostile", stays)
        other = asyncio.create_task(checks.check(SLOW, "other", stays))
        admission.may_end.set()
        await asyncio.gather(other, *slow)
        await checks.check(USUAL, "hostile", stays)

    run(test())


def test_a_grammar_that_was_checked_before_does_not_wait(checks: GrammarChecks, admission: FakeAdmission) -> None:
    async def test() -> None:
        await checks.check(USUAL, "hostile", stays)
        slow = await begin_slow(checks, admission, MAX_PER_TENANT, "hostile")
        await checks.check(USUAL, "hostile", stays)
        admission.may_end.set()
        await asyncio.gather(*slow)

    run(test())


def test_a_check_that_fails_gives_its_place_back(checks: GrammarChecks, admission: FakeAdmission) -> None:
    async def test() -> None:
        admission.may_end.set()
        for _ in range(2 * MAX_PER_TENANT):
            with pytest.raises(RefusedError, match="is bad"):
                await checks.check(Grammar("regex", "slow and bad"), "hostile", stays)

    run(test())


@pytest.mark.parametrize("num_asked", [1, 2])
def test_nothing_is_checked_for_a_client_that_has_left(checks: GrammarChecks, admission: FakeAdmission, num_asked: int) -> None:
    """Regression: a departed client kept its place until its grammar was checked for nobody."""
    answers = [False] * (num_asked - 1) + [True]

    async def has_left() -> bool:
        return answers.pop(0)

    async def test() -> None:
        slow = await begin_slow(checks, admission, 1, "")
        gone = asyncio.create_task(checks.check(SLOW, "", has_left))
        admission.may_end.set()
        with pytest.raises(ClientDisconnect):
            await gone
        await asyncio.gather(*slow)
        assert SLOW not in admission.checked
        assert not answers

    run(test())


NUMBERS = count()


def slow_body() -> dict[str, object]:
    """Return a body with a new schema whose check exceeds the time limit."""
    schema = {"allOf": [{"type": "integer", "multipleOf": 1_000_003 + 2 * next(NUMBERS)}]}
    return {"prompt": "x", "max_tokens": 4, "grammar": {"type": "json_schema", "schema": schema}}


@contextmanager
def flood(server: Live, num_clients: int, headers: dict[str, str]) -> Iterator[list[int]]:
    """Send slow grammars without pause until the block ends; yield the growing list of the answers' statuses."""
    statuses: list[int] = []
    is_over, is_answered = threading.Event(), threading.Event()

    def send() -> None:
        with httpx.Client(base_url=server.url, timeout=LIMIT_S, headers=headers) as client:
            while not is_over.is_set():
                statuses.append(client.post("/generate", json=slow_body()).status_code)
                is_answered.set()

    with ThreadPoolExecutor(num_clients) as pool:
        senders = [pool.submit(send) for _ in range(num_clients)]
        try:
            assert is_answered.wait(LIMIT_S)
            yield statuses
        finally:
            is_over.set()
        for sender in senders:
            sender.result()


def assert_neighbour_is_served(server: Live, headers: dict[str, str]) -> None:
    for number in range(5):
        body = {"prompt": "x", "max_tokens": 8, "grammar": {"type": "regex", "pattern": f"[a-z]{{{number + 1}}}[0-9]{{2}}"}}
        reply = server.client.post("/generate", json=body, headers=headers)
        assert reply.status_code == 200, reply.text
    reply = server.client.post("/generate", json=slow_body(), headers=headers)
    assert reply.status_code == 400, "the slow grammar is checked, and not refused because of other clients"
    assert "takes more than" in reply.text


def test_one_client_s_slow_grammars_do_not_get_others_refused(live: Live) -> None:
    """Regression: with more than eight slow grammars at once, another client's grammar was 429, however small it was."""
    with flood(live, 12, {}) as statuses:
        assert_neighbour_is_served(live, {})
    assert {*statuses} == {400}


@pytest.mark.slow
def test_a_client_that_leaves_gives_its_place_up_when_its_turn_comes(live: Live) -> None:
    with flood(live, 4, {}):
        num_gone = 20
        request = json.dumps(slow_body()).encode()
        head = b"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        for _ in range(num_gone):
            with closing(socket.create_connection(("127.0.0.1", live.port))) as connection:
                connection.sendall(head % len(request) + request)
        wait_until(lambda: live.log.read_text().count(" 499") >= num_gone, "the end of the departed clients' requests")


@pytest.mark.slow
def test_a_tenant_s_slow_grammars_get_only_its_own_refused(writer_model: Path, tmp_path: Path) -> None:
    flags = ["--model", str(writer_model), "--dtype", "float32", "--threads", "1", "--kv-cache-gib", "0.01"]
    flags += ["--keys", str(write_keys(tmp_path)), "--open-metrics"]
    with start_forked(tmp_path / "log", *flags) as server, flood(server, MAX_PER_TENANT + 4, bearer(ACME)) as statuses:
        assert_neighbour_is_served(server, bearer(OTHER))
    assert {*statuses} == {400, 429}
