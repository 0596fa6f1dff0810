"""Exposure of a server: if other machines can reach it, it needs keys or the flag --open."""

import logging
import socket
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from server.access.exposure import ExposedError, check_exposure, is_local_only, log_exposure
from server.settings import Settings
from tests.server.live import LIMIT_S, REPOSITORY, run_main

LOOPBACK = ["127.0.0.1", "127.8.8.8", "127.1", "localhost", "::1"]
REACHED = ["0.0.0.0", "::", "", "0", "10.0.0.7", "203.0.113.9", "2001:db8::1"]


@pytest.mark.parametrize("host", LOOPBACK)
def test_a_loopback_address_needs_no_keys(host: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert is_local_only(host)
    check_exposure(settings := Settings(host=host))
    log_exposure(settings)
    [record] = caplog.records
    assert record.levelno == logging.INFO
    assert "without keys" in record.getMessage()


@pytest.mark.parametrize("host", REACHED)
def test_an_address_that_others_reach_needs_keys(host: str, caplog: pytest.LogCaptureFixture) -> None:
    assert not is_local_only(host)
    with pytest.raises(ExposedError, match=r"pass --keys FILE .* or --open") as caught:
        check_exposure(Settings(host=host))
    assert f"--host: {host!r}" in str(caught.value)
    assert not caplog.records


def test_a_name_is_local_only_if_all_its_addresses_are(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in ("127.0.0.1", "10.0.0.7")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: addresses)
    assert not is_local_only("both.example")
    addresses.pop()
    assert is_local_only("both.example")


@pytest.mark.parametrize("host", REACHED)
def test_open_is_logged_as_a_warning(host: str, caplog: pytest.LogCaptureFixture) -> None:
    check_exposure(settings := Settings(host=host, open=True))
    log_exposure(settings)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "OPEN" in record.getMessage()
    assert "WITHOUT KEYS" in record.getMessage()


@pytest.mark.parametrize("is_open", [False, True])
def test_a_server_with_keys_may_listen_anywhere_and_open_changes_nothing(is_open: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    check_exposure(settings := Settings(host="0.0.0.0", keys=Path("keys.toml"), open=is_open))
    log_exposure(settings)
    [record] = caplog.records
    assert record.getMessage() == "served on 0.0.0.0 to whoever has a key of keys.toml"


@pytest.mark.slow
def test_programs_that_would_be_open_by_mistake_do_not_start(tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text("[tenants.acme]\ncolour = 1\n[[keys]]\nid = 3\n")
    cases = {
        "open": ["--host", "0.0.0.0"],
        "keys": ["--keys", str(tmp_path / "keys.toml")],
        "none": ["--keys", str(tmp_path / "x")],
    }
    processes = {name: run_main(tmp_path / name, "--port", "0", *flags) for name, flags in cases.items()}
    codes = {name: process.wait(LIMIT_S) for name, process in processes.items()}
    outputs = {name: (tmp_path / name).read_text() for name in cases}
    assert codes == {"open": 2, "keys": 1, "none": 1}, outputs
    assert outputs["open"].startswith("error: --host: '0.0.0.0' lets other machines in, and there are no keys; pass --keys FILE")
    assert len(outputs["open"].splitlines()) == 1
    for part in ("keys.toml is not a sound key file:", "  tenants.acme.colour: unknown field", "  keys.1.id: Input should be"):
        assert part in outputs["keys"]
    assert "it cannot be read: No such file" in outputs["none"]
    assert "Traceback" not in "".join(outputs.values())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("https://a.example", ["https://a.example"]),
        ("https://a.example, http://localhost:3000", ["https://a.example", "http://localhost:3000"]),
        ("*", ["*"]),
    ],
)
def test_origins_are_split_at_commas(given: str, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings(_cli_parse_args=["--cors-origins", given]).cors_origins == expected
    monkeypatch.setenv("LORI_CORS_ORIGINS", given)
    assert Settings().cors_origins == expected
    with pytest.raises(ValidationError, match="cors_origins"):
        Settings(_cli_parse_args=["--cors-origins", "a.example/page"])


def test_a_container_is_open_inside_and_published_on_this_machine() -> None:
    compose = yaml.safe_load((REPOSITORY / "docker" / "compose.yaml").read_text())
    assert all(port.startswith("127.0.0.1:") for port in compose["services"]["server"]["ports"])
    dockerfile = (REPOSITORY / "docker" / "Dockerfile").read_text()
    assert ("LORI_HOST=0.0.0.0" in dockerfile) is ("LORI_OPEN=1" in dockerfile) is True
