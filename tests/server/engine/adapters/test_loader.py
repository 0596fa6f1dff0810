"""Adapters are read in a thread of their own: what is read, what is merged, and what is said where they cannot be."""

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
    """A loader on a store of three adapters, and what came of it."""

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

    def load(self, of: Request) -> list[Loaded]:
        """Returns all that is read for a request."""
        for digest, _ in of.residents:
            self.loader.start(digest, of)
        loaded: list[Loaded] = []
        while len(loaded) < len(of.residents):
            assert self.has_news.acquire(timeout=LIMIT_S)
            loaded += self.loader.collect()
        return loaded

    def fault(self, of: Request) -> str:
        """Returns what is said of the one adapter that cannot be read."""
        (loaded,) = self.load(of)
        assert loaded.packed is None
        assert loaded.digest == of.residents[0][0]
        assert str(self.place) not in loaded.fault, "a client is told the faults, not where the file lies"
        return loaded.fault


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    adapters = [save(tmp_path / name, make_config(), make_modules(seed=seed)) for seed, name in enumerate(("a", "b", "c"))]
    desk = Desk(tmp_path, adapters)
    yield desk
    desk.loader.close()


def assert_same(found: PackedAdapter | None, expected: PackedAdapter) -> None:
    assert found is not None
    assert found.basis == expected.basis
    assert found.config.scale == expected.config.scale
    assert [*found.modules.layouts] == [*expected.modules.layouts]
    assert torch.equal(found.modules.blocks, expected.modules.blocks)
    assert torch.equal(found.modules.starts, expected.modules.starts)


def test_each_adapter_of_a_sum_is_read_by_itself(desk: Desk) -> None:
    loaded = {one.digest: one for one in desk.load(desk.request("b", "a"))}
    assert len(loaded) == 2
    for name in ("a", "b"):
        one = loaded[desk.registry.by_name[name].summary.digest]
        assert one.fault == ""
        assert one.seconds > 0
        assert_same(one.packed, pack_adapter(desk.adapters[name], LAYOUTS))


def test_every_arrival_is_told(desk: Desk) -> None:
    (desk.place / "b" / WEIGHTS_FILE).write_bytes(b"torn")
    of = desk.request("a", "b")
    for digest, _ in of.residents:
        desk.loader.start(digest, of)
    for _ in of.residents:
        assert desk.has_news.acquire(timeout=LIMIT_S)
    assert {loaded.digest for loaded in desk.loader.collect()} == {digest for digest, _ in of.residents}


def test_nothing_is_collected_twice(desk: Desk) -> None:
    desk.load(desk.request("a"))
    assert desk.loader.collect() == []


@pytest.mark.parametrize("method", [method for method in MERGE_METHODS if method != "linear"])
def test_a_merge_is_what_merging_the_adapters_gives(desk: Desk, method: MergeMethod) -> None:
    options = MergeOptions(method, density=0.6, seed=3)
    (loaded,) = desk.load(desk.request("b", "a", merge=options, weights=(0.5, 2.0)))
    alone = merge([desk.adapters["a"], desk.adapters["b"]], [2.0, 0.5], method, density=0.6, seed=3)
    assert_same(loaded.packed, pack_adapter(alone, LAYOUTS))


def test_a_file_that_was_changed_since_the_start_is_not_served_as_what_it_was(desk: Desk) -> None:
    of = desk.request("a")
    save(desk.place / "a", make_config(), make_modules(seed=99))
    fault = desk.fault(of)
    assert f"version {of.terms[0].version} was changed on disk" in fault
    assert of.terms[0].digest in fault
    merged = desk.request("b", "a", merge=MergeOptions("ties"))
    assert f"version {of.terms[0].version} was changed on disk" in desk.fault(merged)


def test_an_adapter_that_was_removed_is_a_fault_of_its_own(desk: Desk) -> None:
    of = desk.request("a")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (desk.place / "a" / name).unlink()
    fault = desk.fault(of)
    assert f"{CONFIG_FILE} cannot be read: No such file or directory" in fault
    assert f"{WEIGHTS_FILE} cannot be read: No such file or directory" in fault


def test_all_faults_of_a_file_are_told(desk: Desk) -> None:
    of = desk.request("c")
    config = desk.place / "c" / CONFIG_FILE
    config.write_text(config.read_text().replace('"r": 3', '"r": 2'))
    fault = desk.fault(of)
    assert fault.startswith("cannot be served: ")
    assert "content digest is" in fault
    assert "it was changed, or is damaged" in fault


def test_a_fault_is_told_of_the_adapter_that_has_it(desk: Desk) -> None:
    """Was told of all adapters of the request that was the first to want it, to all who want it."""
    (desk.place / "b" / WEIGHTS_FILE).write_bytes(b"torn")
    of = desk.request("a", "b", "c")
    faults = {loaded.digest: loaded.fault for loaded in desk.load(of) if loaded.fault}
    assert list(faults) == [of.terms[1].digest]
    assert adapter_names(of.terms[1].digest, of) == "'b'"


def test_a_merge_that_cannot_be_is_told_of_all_its_adapters(desk: Desk) -> None:
    of = desk.request("a", "b", merge=MergeOptions("magnitude"), weights=(1e300, 1.0))
    fault = desk.fault(of)
    assert fault.startswith("cannot be served: ")
    assert of.merged_digest is not None
    assert adapter_names(of.merged_digest, of) == "'a' + 'b'"
    assert "not finite" in fault


def test_an_alias_means_what_it_meant_at_the_start(tmp_path: Path) -> None:
    adapters = [save(tmp_path / name, make_config(), make_modules(seed=seed)) for seed, name in enumerate("ab")]
    store = AdapterStore(tmp_path)
    store.alias("prod", "a")
    desk = Desk(tmp_path, adapters)
    store.alias("prod", "b")
    (loaded,) = desk.load(desk.request("prod"))
    assert_same(loaded.packed, pack_adapter(desk.adapters["a"], LAYOUTS))
    desk.loader.close()


class BrokenReader:
    """Fails as no file makes one fail."""

    def read_entry(self, _: object) -> PackedAdapter:
        raise MemoryError("there is no more")


def test_whatever_goes_wrong_is_an_answer(tmp_path: Path) -> None:
    """An error that was not foreseen came out where the engine collects what was read, and ended it."""
    adapter = save(tmp_path / "a", make_config(), make_modules())
    desk = Desk(tmp_path, [adapter], cast(PackedReader, BrokenReader()))
    assert "there is no more" in desk.fault(desk.request("a"))
    desk.loader.close()


class SlowReader:
    """Reads nothing before it is let."""

    def __init__(self) -> None:
        self.is_reading, self.may_read, self.num_read = threading.Event(), threading.Event(), 0

    def read_entry(self, _: object) -> PackedAdapter:
        self.is_reading.set()
        assert self.may_read.wait(LIMIT_S)
        self.num_read += 1
        raise ValueError("enough")


class SlowMergeReader(PackedReader):
    """Lets no merge end before it may, and no adapter where that is said."""

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


def test_adapters_are_read_while_others_are_merged_one_merge_after_the_other(tmp_path: Path) -> None:
    """Merges held the lock that readers need, and eight of them could have all their parts in memory at once."""
    adapters = [save(tmp_path / name, make_config(), make_modules(seed=seed)) for seed, name in enumerate("abc")]
    reader = SlowMergeReader()
    desk = Desk(tmp_path, adapters, reader, max_fetches=8)
    merges = [desk.request("a", "b", merge=MergeOptions(method)) for method in ("ties", "magnitude")]
    for of in merges:
        desk.loader.start(of.residents[0][0], of)
    assert reader.is_merging.wait(LIMIT_S)
    (loaded,) = desk.load(desk.request("c"))
    assert_same(loaded.packed, pack_adapter(desk.adapters["c"], LAYOUTS))
    assert reader.num_merging == 1
    reader.may_merge.set()
    for _ in merges:
        assert desk.has_news.acquire(timeout=LIMIT_S)
    assert [one.fault for one in desk.loader.collect()] == ["", ""]
    desk.loader.close()


def test_a_merge_that_was_waited_for_keeps_no_adapter_from_being_waited_for(tmp_path: Path) -> None:
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
    assert reader.is_reading.wait(LIMIT_S)  # and holds the merge up, before it has read its adapters
    for of in (under_way, queued):
        desk.loader.start(of.residents[0][0], of)
        desk.loader.cancel(of.residents[0][0])
        assert not desk.loader.is_reading(of.residents[0][0])
    desk.loader.cancel(single.residents[0][0])
    assert desk.loader.is_reading(single.residents[0][0]), "an adapter is read to its end"
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


def test_closing_gives_merges_up(tmp_path: Path) -> None:
    adapters = [save(tmp_path / name, make_config(), make_modules(seed=seed)) for seed, name in enumerate("abc")]
    reader = SlowMergeReader()
    desk = Desk(tmp_path, adapters, reader)
    reader.may_read.clear()
    single, merged = desk.request("c"), desk.request("a", "b", merge=MergeOptions("ties"))
    for of in (single, merged):
        desk.loader.start(of.residents[0][0], of)
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


def test_what_is_read_is_waited_for(tmp_path: Path) -> None:
    reader = SlowReader()
    desk = Desk(tmp_path, [save(tmp_path / "a", make_config(), make_modules())], cast(PackedReader, reader))
    desk.loader.wait(LIMIT_S)  # for nothing
    of = desk.request("a")
    desk.loader.start(of.residents[0][0], of)
    assert reader.is_reading.wait(LIMIT_S)
    timer = threading.Timer(0.05, reader.may_read.set)
    timer.start()
    desk.loader.wait(LIMIT_S)
    assert len(desk.loader.collect()) == 1
    desk.loader.close()


def test_it_is_waited_for_once(tmp_path: Path) -> None:
    reader = SlowReader()
    desk = Desk(tmp_path, [save(tmp_path / "a", make_config(), make_modules())], cast(PackedReader, reader))
    of = desk.request("a")
    desk.loader.start(of.residents[0][0], of)
    assert reader.is_reading.wait(LIMIT_S)
    desk.loader.wait(0.0)
    desk.loader.wait(LIMIT_S)  # not at all: nothing lets it read
    assert desk.loader.collect() == []
    reader.may_read.set()
    desk.loader.close()


def test_closing_reads_no_more_than_what_is_begun(tmp_path: Path) -> None:
    adapters = [save(tmp_path / name, make_config(), make_modules(seed=seed)) for seed, name in enumerate("abc")]
    reader = SlowReader()
    desk = Desk(tmp_path, adapters, cast(PackedReader, reader))
    of = desk.request("a", "b", "c")
    for digest, _ in of.residents:
        desk.loader.start(digest, of)
    closing = threading.Thread(target=desk.loader.close)
    closing.start()
    for _ in range(2):  # those that were not begun are given up
        assert desk.has_news.acquire(timeout=LIMIT_S)
    reader.may_read.set()
    closing.join(LIMIT_S)
    assert not closing.is_alive()
    assert reader.num_read == 1
