"""`python -m server.keys`, run as a program."""

import hashlib
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lori.flags import PACKAGE, package_version
from server.access.keys import parse_keys, read_keys
from server.keys import append
from tests.server.keyed import write_keys
from tests.server.live import LIMIT_S, REPOSITORY

KEY = re.compile(r"lori_[A-Za-z0-9_-]{43}")


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "server.keys", *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*arguments: object) -> tuple[int, str, str]:
    process = start(*arguments)
    out, err = process.communicate(timeout=LIMIT_S)
    return process.returncode, out, err


def test_the_version_is_shown() -> None:
    assert run("--version") == (0, f"{PACKAGE} {package_version()}\n", "")


def test_a_key_is_shown_once_and_its_hash_is_stored(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    code, out, err = run(file, "--tenant", "acme")
    key = out.removesuffix("\n")
    assert (code, bool(KEY.fullmatch(key))) == (0, True), err
    assert key not in err
    assert "the key itself is shown this once" in err
    assert "the tenant 'acme' is new, and may use every adapter" in err
    assert key not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    caller = read_keys(file).find(key.encode())
    assert caller
    assert (caller.tenant, caller.key_id) == ("acme", "acme-1")


@pytest.mark.slow
def test_concurrent_runs_lose_no_key(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    processes = [start(file, "--tenant", "acme") for _ in range(3)] + [start(file, "--role", "admin", "--id", "boss")]
    keys = [process.communicate(timeout=LIMIT_S)[0].strip() for process in processes]
    callers = [read_keys(file).find(key.encode()) for key in keys]
    assert {caller.key_id for caller in callers if caller} == {"acme-1", "acme-2", "acme-3", "boss"}
    assert callers[3]
    assert callers[3].is_admin
    assert file.read_text().count("[tenants.acme]") == 1


def test_without_a_file_the_entry_is_printed() -> None:
    code, out, err = run("--role", "monitor")
    key, _, entry = out.partition("\n\n")
    assert (code, err) == (0, "")
    assert KEY.fullmatch(key)
    caller = parse_keys(entry.encode(), "x").find(key.encode())
    assert caller
    assert (caller.key_id, caller.is_monitor, caller.is_admin) == ("monitor-1", True, False)


@pytest.mark.slow
def test_wrong_options_are_2_and_nothing_is_written(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    wrong = [
        [],
        ["--role", "admin", "--tenant", "a"],
        ["--role", "king"],
        ["--tenant", "a b"],
        ["--tenant", "a", "--id", "lori_x"],
    ]
    processes = [start(file, *arguments) for arguments in wrong]
    for process in processes:
        out, err = process.communicate(timeout=LIMIT_S)
        assert (process.returncode, out) == (2, "")
        assert "Invalid value" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "error"),
    [
        pytest.param("[[keys]", "error: {file} is not a sound key file:\n  it is not TOML: ", id="not sound"),
        pytest.param(
            "keys = []\n", "error: {file} with the new key is not a sound key file:\n  it is not TOML: ", id="another form"
        ),
    ],
)
def test_a_file_that_cannot_take_a_key_is_not_changed(tmp_path: Path, content: str, error: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(content)
    code, out, err = run(file, "--tenant", "acme")
    assert (code, out) == (1, "")
    assert err.startswith(error.format(file=file))
    assert "Traceback" not in err
    assert file.read_text() == content


def test_the_id_of_another_key_is_refused(tmp_path: Path) -> None:
    file = write_keys(tmp_path)
    before = file.read_text()
    code, _, err = run(file, "--tenant", "acme", "--id", "other-1")
    assert code == 1
    assert "keys (other-1): 2 keys have this id" in err
    assert file.read_text() == before


def test_a_place_where_nothing_can_be_written_is_named(tmp_path: Path) -> None:
    code, out, err = run(tmp_path, "--tenant", "acme")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert str(tmp_path) in err
    assert "Traceback" not in err


def test_a_new_key_preserves_the_file_s_content_mode_and_link(tmp_path: Path) -> None:
    file, link = write_keys(tmp_path), tmp_path / "link.toml"
    file.write_text(before := file.read_text().rstrip() + "  # the last")
    file.chmod(0o640)
    link.symlink_to(file.name)
    entry = append(link, "tenant", "acme", None)
    assert link.is_symlink()
    assert file.read_text().startswith(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert file.stat().st_uid == os.getuid()
    assert (entry.name, entry.is_first) == ("acme-2", False)
    assert hashlib.sha256(entry.key.encode()).hexdigest() in read_keys(file).callers


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_a_file_keeps_its_owner(tmp_path: Path) -> None:
    file = write_keys(tmp_path)
    os.chown(file, 12345, 12346)
    append(file, "admin", None, None)
    assert (file.stat().st_uid, file.stat().st_gid) == (12345, 12346)


def test_a_tenant_that_was_written_by_hand_gets_its_first_key(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text('[tenants.acme]\nadapters = ["math"]\n')
    entry = append(file, "tenant", "acme", None)
    assert not entry.is_first
    caller = read_keys(file).find(entry.key.encode())
    assert caller
    assert caller.allowed == ("math",)
