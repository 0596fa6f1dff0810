"""Changes of the adapters of a running server, by both clients with an admin's key."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lori.base_model import BaseModel
from lori.config import CONFIG_FILE
from lori.format import CARD_FILE, WEIGHTS_FILE
from lori.prompt_statistics import STATISTICS_FILE
from server.client import (
    AdapterFiles,
    BadRequestError,
    Client,
    ConflictError,
    ForbiddenError,
    NotFoundError,
    adapter_calls,
)
from tests.lori.adapters import write_statistics
from tests.server.both_clients import KINDS, Connect, connecting
from tests.server.office import Office, open_office

ADMIN_KEY, GUEST_KEY = "lori_admin-key", "lori_guest-key"


@pytest.fixture(scope="module")
def office(writer_model: Path, writer: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    """Yield a server that was started with an empty store."""
    place = tmp_path_factory.mktemp("office")
    (place / "merges").mkdir()
    with open_office(writer_model, writer, place, merges=place / "merges") as opened:
        yield opened


@pytest.fixture(params=KINDS)
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    with connecting(request.param) as connect:
        yield connect


@pytest.fixture
def client(office: Office, connect: Connect) -> Iterator[Client]:
    """Yield a client with an admin's key. Empties the store when the test ends."""
    client = connect(str(office.client.base_url), api_key=ADMIN_KEY)
    yield client
    for adapter in client.adapters().adapters:
        client.delete(adapter.name)


def test_the_client_s_names_of_files_are_those_in_a_folder() -> None:
    assert (adapter_calls.CONFIG_FILE, adapter_calls.WEIGHTS_FILE, adapter_calls.CARD_FILE) == (
        CONFIG_FILE,
        WEIGHTS_FILE,
        CARD_FILE,
    )


def test_an_adapter_is_uploaded_shown_and_deleted(office: Office, client: Client) -> None:
    folder = office.draft("math", 1)
    (folder / CARD_FILE).write_text("# A card")
    row = client.upload("math", folder)
    assert (row.name, row.tier, row.num_requests) == ("math", "resident", 0)
    assert client.generate(prompt="x", adapter="math", max_tokens=2).adapter[0].version == row.version
    shown = client.adapter("math")
    assert (shown.versions, shown.card, shown.num_requests) == ([row.version], "# A card", 1)
    assert shown.total.num_kept == sum(module.num_kept for module in shown.modules)
    assert [one.name for one in client.adapters().adapters] == ["math"]
    gone = client.delete("math")
    assert (gone.name, gone.versions, gone.num_using) == ("math", [row.version], 0)
    with pytest.raises(NotFoundError):
        client.adapter("math")


def test_an_adapter_is_uploaded_as_bytes_and_a_name_goes_back_to_a_version(office: Office, client: Client) -> None:
    versions = []
    for seed in (2, 3):
        folder = office.draft("math", seed)
        files = AdapterFiles((folder / CONFIG_FILE).read_bytes(), (folder / WEIGHTS_FILE).read_bytes())
        versions.append(client.upload("math", files).version)
    assert client.adapter(f"math@{versions[0]}").version == versions[0]
    assert client.alias("math", f"math@{versions[0]}").version == versions[0]
    assert client.adapter("math").versions == versions
    assert client.alias("also", "math").name == "also"
    with pytest.raises(ConflictError, match="'also'"):
        client.delete("math")
    client.delete("also")


def test_statistics_of_prompts_are_uploaded_with_their_adapter(office: Office, client: Client) -> None:
    folder = office.draft("math", 9)
    content = write_statistics(folder)
    client.upload("math", folder)
    assert (office.entry_of("math").folder / STATISTICS_FILE).read_bytes() == content
    assert (
        office.upload("math", folder, prompt_statistics=b"x")
        .json()["error"]["message"]
        .startswith(f"math is not a sound adapter: {STATISTICS_FILE}: ")
    )
    write_statistics(folder, "0" * 64)
    with pytest.raises(BadRequestError, match=f"{STATISTICS_FILE}: belongs to the version 000000000000, expected"):
        client.upload("math", folder)
    client.delete("math")


def test_an_adapter_is_pinned_and_unpinned_unloaded_and_loaded(office: Office, client: Client) -> None:
    version = client.upload("math", office.draft("math", 4)).version
    assert client.pin("math").is_pinned
    assert not client.unpin("math").is_pinned
    assert client.unload("math").versions == [version]
    with pytest.raises(NotFoundError):
        client.generate(prompt="x", adapter="math")
    assert client.load("math").version == version


def test_a_merge_is_published_listed_and_deleted(office: Office, client: Client) -> None:
    versions = {name: client.upload(name, office.draft(name, seed)).version for name, seed in (("math", 4), ("law", 5))}
    adapters = [{"reference": f"{name}@{version}", "weight": 0.5} for name, version in versions.items()]
    merge = client.publish_merge("both", {"base_digest": office.base.identity.digest, "adapters": adapters, "about": "even"})
    assert (merge.name, [one.name for one in merge.adapters], merge.about) == ("both", ["math", "law"], "even")
    assert client.adapters().merges == [merge] == [client.merge("both")]
    assert [term.name for term in client.generate(prompt="x", adapter="both", max_tokens=1).adapter] == ["math", "law"]
    assert client.delete_merge("both") == merge
    with pytest.raises(NotFoundError, match="there is no merge 'both'"):
        client.delete_merge("both")


def test_adapters_are_listed_page_by_page(office: Office, client: Client) -> None:
    for name in ("a-one", "a-two", "b"):
        client.upload(name, office.draft("math", 5))
    page = client.adapters(prefix="a", limit=1)
    assert [one.name for one in page.adapters] == ["a-one"]
    assert page.next is not None
    assert [one.name for one in client.adapters(prefix="a", after=page.next).adapters] == ["a-two"]
    assert len(client.adapters().adapters) == 3


def test_an_unsound_adapter_is_refused_with_all_faults(office: Office, client: Client) -> None:
    sound = AdapterFiles.read(office.draft("math", 6))
    with pytest.raises(BadRequestError) as caught:
        client.upload("math", AdapterFiles(sound.config, sound.weights[:-1]))
    assert caught.value.detail.faults
    with pytest.raises(BadRequestError, match="--hub"):
        client.fetch("owner/name", name="math", revision="main")


@pytest.mark.parametrize("name", ["../math", "a b", "maths?x=1", "é", "math/unload"])
def test_a_name_is_never_a_path(client: Client, name: str) -> None:
    with pytest.raises((BadRequestError, NotFoundError)):
        client.pin(name)


def test_without_an_admins_key_nothing_is_changed(office: Office, connect: Connect) -> None:
    guest = connect(str(office.client.base_url), api_key=GUEST_KEY)
    with pytest.raises(ForbiddenError):
        guest.upload("open-math", office.draft("math", 7))
    for change in (guest.delete, guest.pin, guest.unpin, guest.load, guest.unload):
        with pytest.raises(ForbiddenError):
            change("math")


def test_a_card_that_is_a_link_out_of_its_folder_is_not_sent(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("a key")
    (tmp_path / "math").mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (tmp_path / "math" / name).write_text(name)
    assert AdapterFiles.read(tmp_path / "math") == AdapterFiles(CONFIG_FILE.encode(), WEIGHTS_FILE.encode())
    (tmp_path / "math" / "README.md").symlink_to("../secret")
    with pytest.raises(OSError, match="it is a link that leads out of its folder"):
        AdapterFiles.read(tmp_path / "math")
