"""Changes of the key file while the server runs."""

import hashlib
import logging
import os
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from server.access import key_ring
from server.access.key_ring import MAX_UNSETTLED, KeyRing
from server.access.keys import KeyFileError, Keys
from tests.lori.store.test_file_stamp import rewrite
from tests.server.keyed import ACME, ADMIN, bearer, key_table, make_service, served, write_keys
from tests.server.live import wait_until

NEW = "lori_new-key"


def rotate(file: Path, key: str = NEW) -> None:
    """Replace the key file with another one, which has one key."""
    other = file.with_suffix(".new")
    other.write_text("[tenants.acme]\n" + key_table(key, id="acme-2", tenant="acme"))
    os.replace(other, file)


def settle(ring: KeyRing) -> None:
    """Poll as often as a file that changed once needs."""
    for _ in range(2):
        ring.poll()


def test_a_changed_file_is_valid_from_the_second_poll(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ring = KeyRing(write_keys(tmp_path))
    ring.poll()
    assert not caplog.records
    rotate(ring.path)
    ring.poll()
    assert ring.find(ACME.encode())
    ring.poll()
    assert ring.find(ACME.encode()) is None
    caller = ring.find(NEW.encode())
    assert caller
    assert caller.key_id == "acme-2"
    assert "was read again: tenants: 1; keys by role: 1 tenant, 0 admin, 0 monitor" in caplog.text


@pytest.mark.parametrize("content", ["", "[[keys]", "[[keys]]\nid = 3", None])
def test_a_file_that_is_not_sound_changes_nothing_and_is_logged_once_as_an_error(
    tmp_path: Path, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    ring = KeyRing(write_keys(tmp_path))
    if content is None:
        ring.path.unlink()
    else:
        ring.path.write_text(content)
    for _ in range(4):
        ring.poll()
    assert ring.find(ACME.encode())
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage().startswith(
        f"THE KEYS FROM BEFORE STAY, REVOKED ONES TOO: {ring.path} is not a sound key file:\n  "
    )
    rotate(ring.path)
    settle(ring)
    assert ring.find(ACME.encode()) is None


def halves(file: Path) -> list[bytes]:
    """Return the parts of a key file, each of whole tables, so that every beginning of the file is sound."""
    content = file.read_bytes()
    starts = [0, *(place for place in range(60, len(content)) if content.startswith(b"[[keys]]", place)), len(content)]
    return [content[start:stop] for start, stop in pairwise(starts)]


def test_a_file_that_is_being_written_in_place_is_not_accepted_half(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Regression: a file cut at the end of a line is sound, with fewer keys, so the missing keys were refused for a second."""
    ring = KeyRing(write_keys(tmp_path))
    caplog.set_level(logging.INFO)
    parts = halves(ring.path)
    assert len(parts) == 4
    for number in range(1, len(parts) + 1):
        ring.path.write_bytes(b"".join(parts[:number]))
        ring.poll()
        assert ring.find(ADMIN.encode()), "the admin's key comes third"
    assert not caplog.records
    ring.poll()
    assert "was read again: tenants: 2; keys by role: 2 tenant, 1 admin, 1 monitor" in caplog.text


def test_half_a_line_is_not_accepted_however_long_it_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ring = KeyRing(write_keys(tmp_path, "priority = 1000"))
    content = ring.path.read_bytes()
    ring.path.write_bytes(content + b"[tenants.acme_two]\npriority = 10")
    for _ in range(5):
        ring.poll()
    assert "acme_two" not in ring.keys.tenants
    assert "its last line has no end, so this may be half a file" in caplog.text


@pytest.mark.parametrize("is_in_place", [True, False])
def test_a_file_that_is_rewritten_at_equal_size_and_time_is_noticed(tmp_path: Path, is_in_place: bool) -> None:
    ring = KeyRing(write_keys(tmp_path))
    old, new = (hashlib.sha256(key.encode()).hexdigest() for key in (ACME, NEW))
    rewrite(ring.path, ring.path.read_text().replace(old, new), is_in_place=is_in_place)
    settle(ring)
    assert ring.find(ACME.encode()) is None
    assert ring.find(NEW.encode())


def test_a_file_that_never_settles_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ring = KeyRing(write_keys(tmp_path))
    for number in range(2 * MAX_UNSETTLED):
        rotate(ring.path, f"{NEW}-{number}")
        ring.poll()
    [record] = caplog.records
    assert record.getMessage() == f"THE KEYS FROM BEFORE STAY, REVOKED ONES TOO: {ring.path} changes all the time"
    settle(ring)
    assert ring.find(f"{NEW}-{number}".encode())


def test_added_checks_hold_for_new_keys_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def no_new_key(keys: Keys) -> list[str]:
        return ["new"] if keys.find(NEW.encode()) else []

    ring = KeyRing(write_keys(tmp_path))
    ring.add_check(no_new_key)
    rotate(ring.path)
    settle(ring)
    assert ring.find(ACME.encode())
    assert "keys.toml is not a sound key file:\n  new" in caplog.text
    with pytest.raises(KeyFileError, match="new"):
        KeyRing(ring.path).add_check(no_new_key)


def test_a_running_server_accepts_new_keys_and_refuses_old_ones(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_ring, "POLL_S", 0.01)
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
