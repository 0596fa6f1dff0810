"""Keys change while the server runs."""

import logging
import os
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from server.access import key_ring
from server.access.key_ring import KeyRing
from server.access.keys import KeyFileError, Keys
from tests.server.keyed import ACME, ADMIN, bearer, key_table, make_service, served, write_keys
from tests.server.live import wait_until

NEW = "lori_new-key"


def rotate(file: Path, key: str = NEW) -> None:
    """Puts another file in the place of the key file, with one key."""
    other = file.with_suffix(".new")
    other.write_text("[tenants.acme]\n" + key_table(key, id="acme-2", tenant="acme"))
    os.replace(other, file)


def test_a_file_that_changed_counts_from_the_next_look(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ring = KeyRing(write_keys(tmp_path))
    ring.look()
    assert not caplog.records
    rotate(ring.path)
    assert ring.find(ACME.encode())
    ring.look()
    assert ring.find(ACME.encode()) is None
    found = ring.find(NEW.encode())
    assert found
    assert found.key_id == "acme-2"
    assert "was read again: tenants: 1; keys by role: 1 tenant, 0 admin, 0 monitor" in caplog.text


@pytest.mark.parametrize("content", ["", "[[keys]", "[[keys]]\nid = 3", None])
def test_a_file_that_is_not_sound_changes_nothing_and_is_said_once_and_loudly(
    tmp_path: Path, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    ring = KeyRing(write_keys(tmp_path))
    if content is None:
        ring.path.unlink()
    else:
        ring.path.write_text(content)
    for _ in range(3):
        ring.look()
    assert ring.find(ACME.encode())
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage().startswith(
        f"THE KEYS FROM BEFORE STAY, REVOKED ONES TOO: {ring.path} is not a sound key file:\n  "
    )
    rotate(ring.path)
    ring.look()
    assert ring.find(ACME.encode()) is None


def test_what_else_is_required_of_keys_holds_for_new_ones_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def no_new_key(keys: Keys) -> list[str]:
        return ["new"] if keys.find(NEW.encode()) else []

    ring = KeyRing(write_keys(tmp_path))
    ring.require(no_new_key)
    rotate(ring.path)
    ring.look()
    assert ring.find(ACME.encode())
    assert "keys.toml is not a sound key file:\n  new" in caplog.text
    with pytest.raises(KeyFileError, match="new"):
        KeyRing(ring.path).require(no_new_key)


def test_a_running_server_takes_new_keys_and_refuses_old_ones(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_ring, "LOOK_S", 0.01)
    service = make_service(tokenizer, write_keys(tmp_path))
    assert service.keys
    with served(service) as client:

        def status(key: str) -> int:
            return client.get("/adapters", headers=bearer(key)).status_code

        assert (status(ACME), status(NEW)) == (200, 401)
        rotate(service.keys.path)
        wait_until(lambda: status(NEW) == 200, "the new key")
        assert (status(ACME), status(ADMIN)) == (401, 401)
        service.keys.path.write_text("[[keys]")
        rotate(service.keys.path, ACME)
        wait_until(lambda: status(ACME) == 200, "the old key again")
        assert status(NEW) == 401
