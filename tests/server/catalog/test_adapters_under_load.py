"""Adapters replaced, unloaded and deleted under load: each answer is that of the named version, and no client gets a 5xx."""

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from lori.adapter import Adapter
from lori.base_model import BaseModel, load_base_model
from lori.format import load_adapter
from lori.template import encode
from server.engine.admission import Admission
from server.engine.generate_request import GenerateRequest
from server.engine.request import Request
from tests.server.live import LIMIT_S, events, wait_until
from tests.server.office import ADMIN, Office, open_office
from tests.server.rig import fold, greedy

NUM_CLIENTS = 8
PROMPTS = [f"The quick brown fox jumps over the lazy dog, {end}" for end in ("twice. ", "and sleeps. ")]
"""Prompts with a common prefix longer than a block: blocks cached for one version must not be reused for another."""
MAX_TOKENS = 16
Answer = dict[str, Any]


@pytest.fixture
def office(writer_model: Path, writer: BaseModel, tmp_path: Path) -> Iterator[Office]:
    """Yield a server without a cache of read adapters, with few slots and places, so that adapters wait and are read again."""
    settings = {"loaded_gib": 0, "max_resident": 4, "max_batch": 3, "max_step_tokens": 80, "max_rank": 4}
    with open_office(writer_model, writer, tmp_path, **settings) as opened:
        yield opened


@pytest.fixture(scope="module")
def expected_text(writer_model: Path) -> Callable[[Sequence[tuple[Adapter, float]], str], str]:
    """Return a function for the text of transformers with the deltas of adapters in the base model's weights."""

    def text(terms: Sequence[tuple[Adapter, float]], prompt: str) -> str:
        base = load_base_model(str(writer_model), torch.float32)
        ids = encode(base.tokenizer, prompt).ids
        decoded = base.tokenizer.decode(greedy(fold(base.model, terms), ids, MAX_TOKENS))
        assert isinstance(decoded, str)
        return decoded

    return text


class Crowd:
    """Clients that request adapters until they are stopped, and check each answer."""

    def __init__(self, office: Office, asked: Sequence[Any], expected: dict[tuple[tuple[str, ...], str], str]) -> None:
        self.statuses: Counter[int] = Counter()
        self.versions: Counter[tuple[str, ...]] = Counter()
        self._office, self._asked, self._expected = office, asked, expected
        self._has_ended = threading.Event()

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Send requests until the block ends."""
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            clients = [pool.submit(self._ask_on, number) for number in range(NUM_CLIENTS)]
            try:
                yield
            finally:
                self._has_ended.set()
                for client in clients:
                    client.result(LIMIT_S)

    def wait_for(self, num_answers: int) -> None:
        """Wait for `num_answers` more answers."""
        until = self.statuses.total() + num_answers
        wait_until(lambda: self.statuses.total() >= until or self._has_ended.is_set(), "answers")

    def _ask_on(self, number: int) -> None:
        draw = random.Random(number)
        with httpx.Client(base_url=self._office.client.base_url, timeout=LIMIT_S, headers=ADMIN) as client:
            try:
                while not self._has_ended.is_set():
                    self._ask(client, draw.choice(self._asked), draw.choice(PROMPTS), draw.random() < 0.3)
            finally:
                self._has_ended.set()

    def _ask(self, client: httpx.Client, adapter: Any, prompt: str, is_stream: bool) -> None:
        body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "adapter": adapter, "stream": is_stream}
        with client.stream("POST", "/generate", json=body) as reply:
            if reply.status_code != 200:
                reply.read()
                assert reply.status_code == 404, reply.text
                answer = None
            elif is_stream:
                *tokens, (last, done) = events(reply.iter_lines())
                assert last == "done", done
                answer = done | {"text": "".join(data["text"] for _, data in tokens)}
            else:
                reply.read()
                answer = reply.json()
        if answer:
            self._check(adapter, prompt, answer)
        self.statuses[reply.status_code] += 1

    def _check(self, adapter: Any, prompt: str, answer: Answer) -> None:
        used = tuple(term["version"] for term in answer["adapter"])
        if isinstance(adapter, str) and "@" in adapter:
            assert used == (adapter.partition("@")[2],)
        assert answer["text"] == self._expected[used, prompt]
        self.versions[used] += 1


def check_nothing_is_left(office: Office) -> None:
    """Check that all requests, slots and memory were freed."""
    office.wait_until_idle()
    wait_until(lambda: not office.service.engine.tier_usage(), "all slots and memory to be free")
    families = text_string_to_metric_families(office.client.get("/metrics").text)
    values = {sample.name: sample.value for family in families for sample in family.samples}
    for name in ("lori:adapters_resident", "lori:adapters_loaded", "lori:adapters_resident_bytes", "lori:adapters_loaded_bytes"):
        assert values[name] == 0
    adapter_cache = office.service.engine._engine.adapter_cache
    adapter_cache.check_integrity([])
    assert not adapter_cache._dropped
    assert not adapter_cache._waiters
    departures = office.service.admin._departures
    assert not departures._withdrawn
    assert not departures._deletions
    assert not office.service.uses._uses
    assert not office.service.registry._tables.by_digest


@pytest.mark.slow
def test_replacing_under_load_gives_no_wrong_answer(office: Office, expected_text: Callable[..., str]) -> None:
    folders = [office.draft("x", seed) for seed in (1, 2)]
    old, new = map(load_adapter, folders)
    for folder in folders:
        office.upload("x", folder).raise_for_status()
    other = office.have("y", 3)
    expected = {((v.version,), p): expected_text([(v, 1.0)], p) for v in (old, new) for p in PROMPTS}
    expected |= {((v.version, other.version), p): expected_text([(v, 0.5), (other, 0.5)], p) for v in (old, new) for p in PROMPTS}
    assert len({*expected.values()}) == len(expected)
    crowd = Crowd(office, ["x", "x", f"x@{old.version}", f"x@{new.version}", ["x", "y"]], expected)
    with crowd.asking():
        for flip in range(40):
            folder = folders[flip % 2]
            if flip % 4 < 2:
                assert office.upload("x", folder).status_code == 201
            else:
                reply = office.client.put("/adapters/x/alias", json={"adapter": f"x@{load_adapter(folder).version}"})
                assert reply.status_code == 200, reply.text
            crowd.wait_for(5)
    assert set(crowd.statuses) == {200}
    assert set(crowd.versions) == {used for used, _ in expected}, "every version was requested"
    for name in "xy":
        assert office.client.delete(f"/adapters/{name}").status_code == 200
    check_nothing_is_left(office)


@pytest.mark.slow
def test_deleting_under_load_gives_404_and_no_other_error(office: Office, expected_text: Callable[..., str]) -> None:
    folders = [office.draft("x", seed) for seed in (4, 5)]
    others = {name: office.have(name, seed) for seed, name in enumerate(("a", "b", "c", "d"), start=10)}
    served = [*map(load_adapter, folders), *others.values()]
    expected = {((v.version,), p): expected_text([(v, 1.0)], p) for v in served for p in PROMPTS}
    statuses: Counter[int] = Counter()
    crowd = Crowd(office, ["x", "x", *others], expected)
    with crowd.asking():
        for repetition in range(30):
            assert office.upload("x", folders[repetition % 2]).status_code == 201
            crowd.wait_for(8)
            statuses[(gone := office.client.delete("/adapters/x")).status_code] += 1
            assert gone.status_code in (200, 202), gone.text
            assert (gone.json()["num_using"] > 0) == (gone.status_code == 202)
            if repetition % 3:
                crowd.wait_for(8)
    assert set(crowd.statuses) == {200, 404}
    assert statuses[202], "some were in use"
    for name in others:
        assert office.client.delete(f"/adapters/{name}").status_code == 200
    check_nothing_is_left(office)
    wait_until(lambda: not office.store.versions("x"), "the files to go")
    assert office.store.alias_names() == []


class SlowAdmission:
    """An admission that waits, after it has admitted a request, until it may go on."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.has_admitted, self.may_go_on = threading.Event(), threading.Event()

    def admit(self, ask: GenerateRequest) -> Request:
        request = self._admission.admit(ask)
        self.has_admitted.set()
        assert self.may_go_on.wait(LIMIT_S)
        return request

    def __getattr__(self, name: str) -> Any:
        return getattr(self._admission, name)


def test_an_adapter_withdrawn_while_a_request_is_admitted_is_not_served_to_it(office: Office) -> None:
    office.have("x", 1)
    slow = SlowAdmission(office.service.admission)
    office.service.admission = cast(Admission, slow)
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(office.ask, "x")
        assert slow.has_admitted.wait(LIMIT_S)
        assert office.client.delete("/adapters/x").status_code == 200
        slow.may_go_on.set()
        assert reply.result().status_code == 404
    check_nothing_is_left(office)


@pytest.mark.slow
def test_unloading_under_load_gives_404_and_no_other_error(office: Office, expected_text: Callable[..., str]) -> None:
    adapter = office.have("x", 6)
    expected = {((adapter.version,), p): expected_text([(adapter, 1.0)], p) for p in PROMPTS}
    crowd = Crowd(office, ["x", f"x@{adapter.version}"], expected)
    with crowd.asking():
        for _ in range(30):
            assert office.post("/adapters/x/load").status_code == 200
            crowd.wait_for(8)
            assert office.post("/adapters/x/unload").status_code in (200, 202)
            crowd.wait_for(4)
    assert set(crowd.statuses) == {200, 404}
    check_nothing_is_left(office)
    assert office.store.find("x").version == adapter.version


@pytest.mark.slow
def test_admins_who_change_one_name_at_once_leave_a_sound_server(office: Office, expected_text: Callable[..., str]) -> None:
    """Make changes of every kind in any order. Each is made whole or refused, and the remaining adapters can be deleted."""
    folders = [office.draft("x", seed) for seed in (7, 8)]
    versions = [load_adapter(folder) for folder in folders]
    expected = {((v.version,), p): expected_text([(v, 1.0)], p) for v in versions for p in PROMPTS}
    office.upload("x", folders[0]).raise_for_status()
    allowed = {200, 201, 202, 404, 409, 429}

    def change(number: int) -> Counter[int]:
        draw, statuses = random.Random(number), Counter[int]()
        with httpx.Client(base_url=office.client.base_url, timeout=LIMIT_S, headers=ADMIN) as client:
            own = Office(client, office.service, office.store, office.base, office.drafts)
            version = [adapter.version for adapter in versions]
            changes: list[Callable[[], httpx.Response]] = [
                lambda: own.upload("x", draw.choice(folders)),
                lambda: client.delete("/adapters/x"),
                lambda: client.delete(f"/adapters/x@{draw.choice(version)}"),
                lambda: own.post("/adapters/x/load"),
                lambda: own.post("/adapters/x/unload"),
                lambda: own.post(f"/adapters/x@{draw.choice(version)}/unload"),
                lambda: own.post("/adapters/x/pin"),
                lambda: own.post("/adapters/x/unpin"),
                lambda: client.put("/adapters/x/alias", json={"adapter": f"x@{draw.choice(version)}"}),
                lambda: client.put("/adapters/prod/alias", json={"adapter": "x"}),
                lambda: client.delete("/adapters/prod"),
                lambda: client.get("/adapters/x"),
                lambda: client.get("/adapters"),
                lambda: own.post("/v1/load_lora_adapter", lora_name="moving", lora_path="x", load_inplace=True),
                lambda: own.post("/v1/unload_lora_adapter", lora_name="moving"),
            ]
            for _ in range(60):
                reply = draw.choice(changes)()
                assert reply.status_code in allowed, reply.text
                statuses[reply.status_code] += 1
        return statuses

    crowd = Crowd(office, ["x", "prod", "moving"], expected)
    with crowd.asking(), ThreadPoolExecutor(4) as pool:
        statuses = sum(pool.map(change, range(4)), Counter[int]())
    assert {200, 201, 404, 409} <= set(statuses), "some changes were made, and some refused"
    assert set(crowd.statuses) <= {200, 404}
    for request in (
        "POST /adapters/x/unpin",
        "POST /adapters/prod/unload",
        "POST /adapters/moving/unload",
        "DELETE /adapters/prod",
        "DELETE /adapters/x",
    ):
        reply = office.client.request(*request.split())
        assert reply.status_code in (200, 202, 404), reply.text
    check_nothing_is_left(office)
    assert office.service.engine._engine.adapter_cache.residents.num_pinned == 0
    office.have("x", 7)
    assert office.generate("x", prompt=PROMPTS[0], max_tokens=MAX_TOKENS)["text"] == expected[(versions[0].version,), PROMPTS[0]]
