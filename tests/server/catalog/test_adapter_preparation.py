"""Preparation of a server at start: for bases and ranks of later adapters, and for versions that no name refers to."""

import logging
import shutil
from pathlib import Path

import pytest

from lori.base_model import BaseModel
from lori.basis import Seeded
from lori.config import CONFIG_FILE
from lori.errors import AdapterError
from lori.store.store import AdapterStore
from lori.summary import summarise
from server.loading import load_service, make_registry
from server.served_model import NEW_RANK, make_pool
from server.settings import Settings
from tests.server.office import open_office
from tests.server.replies import refusal
from tests.server.rig import write_adapter


@pytest.mark.slow
def test_an_empty_store_is_prepared_for_the_defaults_of_training(writer_model: Path, writer: BaseModel, tmp_path: Path) -> None:
    with open_office(writer_model, writer, tmp_path) as office:
        office.have("usual", 1, rank=NEW_RANK)
        assert office.generate("usual")["text"] != office.generate(None)["text"]
        refusal(office.upload("high", office.draft("high", 2, rank=NEW_RANK + 1)), 409)


@pytest.mark.slow
def test_a_store_is_prepared_for_the_ranks_and_bases_that_it_has_and_the_default_basis(
    writer_model: Path, writer: BaseModel, tmp_path: Path
) -> None:
    (tmp_path / "store").mkdir()
    write_adapter(tmp_path / "store" / "there", writer, seed=1, rank=5, stream=3)
    with open_office(writer_model, writer, tmp_path) as office:
        for name, changes in (("same", {"rank": 5, "stream": 3}), ("default", {"rank": 2})):
            office.have(name, 2, **changes)
        both = office.generate(["same", "default"], merge="linear")
        assert len({both["text"], *(office.generate(name)["text"] for name in ("same", "default", "there"))}) == 4
        assert "--max-rank 6" in refusal(office.upload("high", office.draft("high", 2, rank=6)), 409)["message"]
        assert "(seed 0, stream 3) or (seed 0, stream 0)" in refusal(
            office.upload("other", office.draft("other", 2, stream=4)), 409
        )["message"]  # fmt: skip


def test_a_max_rank_below_that_of_an_adapter_in_the_store_is_refused(
    writer_model: Path, writer: BaseModel, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "math", writer, seed=1, rank=5)
    with pytest.raises(AdapterError, match="--max-rank is 4, and 'math' has rank 5"):
        load_service(Settings(model=str(writer_model), adapters=tmp_path, dtype="float32", max_rank=4))


def test_without_a_store_to_change_only_the_present_adapters_are_prepared_for(writer: BaseModel, tmp_path: Path) -> None:
    write_adapter(tmp_path / "math", writer, seed=1, rank=5, stream=3)
    entries = AdapterStore(tmp_path).current()
    registry = make_registry(entries, summarise(entries, writer.identity))
    pool = make_pool(writer, registry, 4, max_rank=9)
    assert (pool.bases, pool.rank) == ((Seeded(stream=3),), 5)
    assert not make_pool(writer, make_registry({}, {}), 4).has_operands


@pytest.mark.slow
def test_versions_that_no_name_refers_to_can_be_requested_after_a_restart(
    writer_model: Path, writer: BaseModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_office(writer_model, writer, tmp_path, max_rank=6) as office:
        texts = {}
        for seed in (1, 2):
            adapter = office.have("math", seed)
            texts[adapter.version] = office.generate("math")["text"]
        high, torn = office.have("math", 3, rank=6), office.have("math", 4)
        current = office.have("math", 1)
        office.client.put("/adapters/prod/alias", json={"adapter": "math"}).raise_for_status()
        (office.store.root / f"math@{torn.version}" / CONFIG_FILE).write_bytes(b"{}")
    caplog.set_level(logging.WARNING)
    with open_office(writer_model, writer, tmp_path) as office:
        assert office.client.get("/adapters/math").json()["versions"] == [
            current.version,
            *(v for v in texts if v != current.version),
        ]
        for version, text in texts.items():
            assert office.generate(f"math@{version}")["text"] == text
        assert office.ask(f"math@{high.version}").status_code == 404
        assert office.ask(f"math@{torn.version[:6]}").json()["error"]["type"] == "AdapterError"
        assert [row["name"] for row in office.client.get("/adapters").json()["faulty"]] == [f"math@{torn.version}"]
        assert office.client.get("/adapters/prod").json()["aliases"] == ["math"]
    for unfit in (high, torn):
        assert f"math@{unfit.version} cannot be asked for" in caplog.text
    shutil.rmtree(tmp_path / "store")
