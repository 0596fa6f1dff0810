"""Loader threads: adapters that are read, merges that are built, and the faults of those that cannot be."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch

from lori.adapter import Adapter
from lori.config import CONFIG_FILE
from lori.format import WEIGHTS_FILE
from lori.kernels.layout import Layout
from lori.merge import merge
from lori.merge_options import MERGE_METHODS, MergeMethod, MergeOptions
from lori.packed_adapter import Layouts, PackedAdapter, PackedReader, pack_adapter
from lori.store.entry import Entry
from lori.store.store import AdapterStore
from lori.summary import summarise
from server.engine.adapters.loader import Loaded, Loader, adapter_names
from server.engine.adapters.registry import Registry
from server.engine.request import AdapterTerm, Request
from server.loading import make_registry
from tests.lori.adapters import BASE, SHAPES, make_config, make_modules, save
from tests.server.plans import request

LAYOUTS = {name: Layout(num_outputs, 8, torch.float32) for name, (num_outputs, _) in SHAPES.items()}
LIMIT_S = 60


class Desk:
    """A loader on a store of adapters, which counts its notifications."""

    def __init__(
        self, place: Path, adapters: Sequence[Adapter], reader: PackedReader | None = None, max_fetches: int = 1
    ) -> None:
        self.place, self.adapters = place, {adapter.name: adapter for adapter in adapters}
        entries = AdapterStore(place).current()
        self.registry: Registry = make_registry(entries, summarise(entries, BASE))
        self.loader = Loader(self.registry, reader or PackedReader(BASE, LAYOUTS), max_fetches)
        self.has_news = threading.Semaphore(0)
        self.loader.notify = self.has_news.release

    def request(self, *names: str, merge: MergeOptions = MergeOptions(), weights: Sequence[float] = ()) -> Request:  # noqa: B008 - frozen
        digests = [self.registry.by_name[name].summary.digest for name in names]
        terms = [AdapterTerm(n, d, w) for n, d, w in zip(names, digests, weights or [1.0] * len(names), strict=True)]
        return replace(request(), terms=tuple(terms), merge=merge)

    def load(self, wanted: Request) -> list[Loaded]:
        """Load all that a request needs, and return it."""
        for digest, _ in wanted.residents:
            self.loader.start(digest, wanted)
        loaded: list[Loaded] = []
        while len(loaded) < len(wanted.residents):
            assert self.has_news.acquire(timeout=LIMIT_S)
            loaded += self.loader.collect()
        return loaded

    def fault(self, wanted: Request) -> str:
        """Load a request of one adapter, or one merge, that cannot be read, and return its fault."""
        (loaded,) = self.load(wanted)
        assert loaded.packed is None
        assert loaded.digest == wanted.residents[0][0]
        assert str(self.place) not in loaded.fault, "a client sees the fault, but not the path of the file"
        return loaded.fault


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    adapters = [save(tmp_path / name, make_config(), make_modules(seed=seed)) for seed, name in enumerate(("a", "b", "c"))]
    desk = Desk(tmp_path, adapters)
    yield desk
    desk.loader.close()


def assert_same(actual: PackedAdapter | None, expected: PackedAdapter) -> None:
    assert actual is not None
    assert actual.basis == expected.basis
    assert actual.config.scale == expected.config.scale
    assert [*actual.modules.layouts] == [*expected.modules.layouts]
    assert torch.equal(actual.modules.blocks, expected.modules.blocks)
    assert torch.equal(actual.modules.starts, expected.modules.starts)


def test_each_adapter_of_a_sum_is_read_by_itself(desk: Desk) -> None:
    loaded = {one.digest: one for one in desk.load(desk.request("b", "a"))}
    assert len(loaded) == 2
    for name in ("a", "b"):
        one = loaded[desk.registry.by_name[name].summary.digest]
        assert one.fault == ""
        assert one.seconds > 0
        assert_same(one.packed, pack_adapter(desk.adapters[name], LAYOUTS))


def test_every_arrival_is_notified(desk: Desk) -> None:
    (desk.place / "b" / WEIGHTS_FILE).write_bytes(b"torn")
    wanted = desk.request("a", "b")
    for digest, _ in wanted.residents:
        desk.loader.start(digest, wanted)
    for _ in wanted.residents:
        assert desk.has_news.acquire(timeout=LIMIT_S)
    assert {loaded.digest for loaded in desk.loader.collect()} == {digest for digest, _ in wanted.residents}


def test_nothing_is_collected_twice(desk: Desk) -> None:
    desk.load(desk.request("a"))
    assert desk.loader.collect() == []


@pytest.mark.parametrize("method", [method for method in MERGE_METHODS if method != "linear"])
def test_a_loaded_merge_equals_the_merge_of_the_adapters(desk: Desk, method: MergeMethod) -> None:
    options = MergeOptions(method, density=0.6, seed=3)
    (loaded,) = desk.load(desk.request("b", "a", merge=options, weights=(0.5, 2.0)))
    alone = merge([desk.adapters["a"], desk.adapters["b"]], [2.0, 0.5], method, density=0.6, seed=3)
    assert_same(loaded.packed, pack_adapter(alone, LAYOUTS))


def test_a_file_that_was_changed_since_the_start_is_a_fault(desk: Desk) -> None:
    wanted = desk.request("a")
    save(desk.place / "a", make_config(), make_modules(seed=99))
    fault = desk.fault(wanted)
    assert f"version {wanted.terms[0].version} was changed on disk" in fault
    assert wanted.terms[0].digest in fault
    merged = desk.request("b", "a", merge=MergeOptions("ties"))
    assert f"version {wanted.terms[0].version} was changed on disk" in desk.fault(merged)


def test_a_removed_adapter_has_a_fault_for_each_missing_file(desk: Desk) -> None:
    wanted = desk.request("a")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (desk.place / "a" / name).unlink()
    fault = desk.fault(wanted)
    assert f"{CONFIG_FILE} cannot be read: No such file or directory" in fault
    assert f"{WEIGHTS_FILE} cannot be read: No such file or directory" in fault


def test_all_faults_of_an_adapter_are_reported(desk: Desk) -> None:
    wanted = desk.request("c")
    config = desk.place / "c" / CONFIG_FILE
    config.write_text(config.read_text().replace('"r": 3', '"r": 2'))
    fault = desk.fault(wanted)
    assert fault.startswith("cannot be served: ")
    assert "content digest is" in fault
    assert "it was changed, or is damaged" in fault


def test_a_fault_is_reported_for_the_adapter_that_has_it(desk: Desk) -> None:
    """Regression: every request that wanted the adapter was given a fault that named all adapters of the first such request."""
    (desk.place / "b" / WEIGHTS_FILE).write_bytes(b"torn")
    wanted = desk.request("a", "b", "c")
    faults = {loaded.digest: loaded.fault for loaded in desk.load(wanted) if loaded.fault}
    assert list(faults) == [wanted.terms[1].digest]
    assert adapter_names(wanted.terms[1].digest, wanted) == "'b'"


def test_the_fault_of_a_merge_names_all_its_adapters(desk: Desk) -> None:
    wanted = desk.request("a", "b", merge=MergeOptions("magnitude"), weights=(1e300, 1.0))
    fault = desk.fault(wanted)
    assert fault.startswith("cannot be served: ")
    assert wanted.merged_digest is not None
    assert adapter_names(wanted.merged_digest, wanted) == "'a' + 'b'"
    assert "not finite" in fault


def test_an_alias_keeps_its_meaning_from_the_start(tmp_path: Path) -> None:
    adapters = [save(tmp_path / name, make_config(), make_modules(seed=seed)) for seed, name in enumerate("ab")]
    store = AdapterStore(tmp_path)
    store.alias("prod", "a")
    desk = Desk(tmp_path, adapters)
    store.alias("prod", "b")
    (loaded,) = desk.load(desk.request("prod"))
    assert_same(loaded.packed, pack_adapter(desk.adapters["a"], LAYOUTS))
    desk.loader.close()


class BrokenReader:
    """A reader that fails with an error that no file causes."""

    def read_entry(self, _: object) -> PackedAdapter:
        raise MemoryError("there is no more")


def test_an_unforeseen_error_is_reported_as_a_fault(tmp_path: Path) -> None:
    """Regression: collect() raised the unforeseen error in the engine's thread, and ended the engine."""
    adapter = save(tmp_path / "a", make_config(), make_modules())
    desk = Desk(tmp_path, [adapter], cast(PackedReader, BrokenReader()))
    assert "there is no more" in desk.fault(desk.request("a"))
    desk.loader.close()


class SlowReader:
    """A reader that blocks until `may_read` is set."""

    def __init__(self) -> None:
        self.is_reading, self.may_read, self.num_read = threading.Event(), threading.Event(), 0

    def read_entry(self, _: object) -> PackedAdapter:
        self.is_reading.set()
        assert self.may_read.wait(LIMIT_S)
        self.num_read += 1
        raise ValueError("enough")


class SlowMergeReader(PackedReader):
    """A reader whose merges block until `may_merge` is set, and whose reads block while `may_read` is cleared."""

    def __init__(self) -> None:
        self.num_merging, self.is_merging, self.may_merge = 0, threading.Event(), threading.Event()
        self.is_reading, self.may_read = threading.Event(), threading.Event()
        self.may_read.set()
        super().__init__(BASE, LAYOUTS)

    def read_entry(self, entry: Entry) -> PackedAdapter:
        self.is_reading.set()
        assert self.may_read.wait(LIMIT_S)
        return super().read_entry(entry)

    @property
    def layouts(self) -> Layouts:
        if threading.current_thread().name.startswith("merges"):
            self.num_merging += 1
            self.is_merging.set()
            assert self.may_merge.wait(LIMIT_S)
        return LAYOUTS

    @layouts.setter
    def layouts(self, _: Layouts) -> None:
        pass


def test_adapters_are_read_beside_merges_and_merges_are_built_one_at_a_time(tmp_path: Path) -> None:
    """Regression: merges held the lock that readers need, and eight merges could have all their parts in memory at once."""
    adapters = [save(tmp_path / name, make_config(), make_modules(seed=seed)) for seed, name in enumerate("abc")]
    reader = SlowMergeReader()
    desk = Desk(tmp_path, adapters, reader, max_fetches=8)
    merges = [desk.request("a", "b", merge=MergeOptions(method)) for method in ("ties", "magnitude")]
    for wanted in merges:
        desk.loader.start(wanted.residents[0][0], wanted)
    assert reader.is_merging.wait(LIMIT_S)
    (loaded,) = desk.load(desk.request("c"))
    assert_same(loaded.packed, pack_adapter(desk.adapters["c"], LAYOUTS))
    assert reader.num_merging == 1
    reader.may_merge.set()
    for _ in merges:
        assert desk.has_news.acquire(timeout=LIMIT_S)
    assert [one.fault for one in desk.loader.collect()] == ["", ""]
    desk.loader.close()


def test_an_adapter_is_waited_for_after_the_wait_for_a_merge_timed_out(tmp_path: Path) -> None:
    adapters = [save(tmp_path / name, make_config(), make_modules(seed=seed)) for seed, name in enumerate("abc")]
    reader = SlowMergeReader()
    desk = Desk(tmp_path, adapters, reader)
    merged, single = desk.request("a", "b", merge=MergeOptions("ties")), desk.request("c")
    desk.loader.start(merged.residents[0][0], merged)
    assert reader.is_merging.wait(LIMIT_S)
    desk.loader.wait(0.0)
    reader.may_read.clear()
    desk.loader.start(single.residents[0][0], single)
    assert reader.is_reading.wait(LIMIT_S)
    timer = threading.Timer(0.05, reader.may_read.set)
    timer.start()
    desk.loader.wait(LIMIT_S)
    assert [one.digest for one in desk.loader.collect()] == [single.residents[0][0]]
    reader.may_merge.set()
    desk.loader.close()


def test_a_merge_that_was_cancelled_is_not_collected_and_can_begin_anew(tmp_path: Path) -> None:
    adapters = [save(tmp_path / name, make_config(), make_modules(seed=seed)) for seed, name in enumerate("abc")]
    reader = SlowMergeReader()
    desk = Desk(tmp_path, adapters, reader)
    under_way, queued = (desk.request("a", "b", merge=MergeOptions(method)) for method in ("ties", "magnitude"))
    reader.may_read.clear()
    reader.may_merge.set()
    single = desk.request("c")
    desk.loader.start(single.residents[0][0], single)
    assert reader.is_reading.wait(LIMIT_S)  # The merge waits behind this read, before it has read its own adapters.
    for wanted in (under_way, queued):
        desk.loader.start(wanted.residents[0][0], wanted)
        desk.loader.cancel(wanted.residents[0][0])
        assert not desk.loader.is_reading(wanted.residents[0][0])
    desk.loader.cancel(single.residents[0][0])
    assert desk.loader.is_reading(single.residents[0][0]), "the read of an adapter is not cancelled"
    desk.loader.start(queued.residents[0][0], queued)
    reader.may_read.set()
    loaded: list[Loaded] = []
    while len(loaded) < 2:
        assert desk.has_news.acquire(timeout=LIMIT_S)
        loaded += desk.loader.collect()
    desk.loader.close()
    assert reader.num_merging == 1
    assert {one.digest: one.fault for one in loaded} == {single.residents[0][0]: "", queued.residents[0][0]: ""}
    assert desk.loader.collect() == []
    assert desk.loader.num_reading == 0


def test_closing_cancels_merges(tmp_path: Path) -> None:
    adapters = [save(tmp_path / name, make_config(), make_modules(seed=seed)) for seed, name in enumerate("abc")]
    reader = SlowMergeReader()
    desk = Desk(tmp_path, adapters, reader)
    reader.may_read.clear()
    single, merged = desk.request("c"), desk.request("a", "b", merge=MergeOptions("ties"))
    for wanted in (single, merged):
        desk.loader.start(wanted.residents[0][0], wanted)
    assert reader.is_reading.wait(LIMIT_S)
    closing = threading.Thread(target=desk.loader.close)
    closing.start()
    with desk.loader._lock:
        cancellation = desk.loader._cancellations[merged.residents[0][0]]
    assert cancellation.wait(LIMIT_S)
    reader.may_read.set()
    closing.join(LIMIT_S)
    assert not closing.is_alive()
    assert reader.num_merging == 0


def test_wait_returns_when_an_adapter_has_arrived(tmp_path: Path) -> None:
    reader = SlowReader()
    desk = Desk(tmp_path, [save(tmp_path / "a", make_config(), make_modules())], cast(PackedReader, reader))
    desk.loader.wait(LIMIT_S)  # returns at once: nothing is being read
    wanted = desk.request("a")
    desk.loader.start(wanted.residents[0][0], wanted)
    assert reader.is_reading.wait(LIMIT_S)
    timer = threading.Timer(0.05, reader.may_read.set)
    timer.start()
    desk.loader.wait(LIMIT_S)
    assert len(desk.loader.collect()) == 1
    desk.loader.close()


def test_an_adapter_is_waited_for_only_once(tmp_path: Path) -> None:
    reader = SlowReader()
    desk = Desk(tmp_path, [save(tmp_path / "a", make_config(), make_modules())], cast(PackedReader, reader))
    wanted = desk.request("a")
    desk.loader.start(wanted.residents[0][0], wanted)
    assert reader.is_reading.wait(LIMIT_S)
    desk.loader.wait(0.0)
    desk.loader.wait(LIMIT_S)  # returns at once, although the reader still blocks
    assert desk.loader.collect() == []
    reader.may_read.set()
    desk.loader.close()


def test_closing_finishes_only_the_read_that_has_begun(tmp_path: Path) -> None:
    adapters = [save(tmp_path / name, make_config(), make_modules(seed=seed)) for seed, name in enumerate("abc")]
    reader = SlowReader()
    desk = Desk(tmp_path, adapters, cast(PackedReader, reader))
    wanted = desk.request("a", "b", "c")
    for digest, _ in wanted.residents:
        desk.loader.start(digest, wanted)
    closing = threading.Thread(target=desk.loader.close)
    closing.start()
    for _ in range(2):  # the two reads that have not begun are cancelled
        assert desk.has_news.acquire(timeout=LIMIT_S)
    reader.may_read.set()
    closing.join(LIMIT_S)
    assert not closing.is_alive()
    assert reader.num_read == 1
