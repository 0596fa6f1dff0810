"""Settings of Ray Serve in environment variables."""

import os
import subprocess

import pytest

from server.cluster.environment import CLIENT_TIMEOUT, HAPROXY, MAX_CONNECTIONS, PORTS, PREFERRED, StartError, prepare_environment
from server.settings import Settings


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PREFERRED, *PORTS, HAPROXY):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


def test_a_silent_client_is_waited_for_as_long_as_the_flags_allow() -> None:
    """Regression: HAProxy waited an hour for a request's headers, so 4096 such connections kept all others out."""
    prepare_environment(Settings(keep_alive_s=5, max_body_s=7.5, max_unread_s=3))
    assert os.environ[CLIENT_TIMEOUT] == "8"
    assert PREFERRED[CLIENT_TIMEOUT] == "75"


def test_haproxy_accepts_as_many_connections_as_the_flag_allows() -> None:
    prepare_environment(Settings(max_connections=77))
    assert os.environ[MAX_CONNECTIONS] == "77"
    assert PREFERRED[MAX_CONNECTIONS] == "4096"


def test_requests_come_by_haproxy_in_throughput_mode() -> None:
    prepare_environment(Settings())
    assert os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == os.environ["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"


def test_haproxy_is_the_program_that_notices_clients_that_leave() -> None:
    prepare_environment(Settings())
    process = subprocess.run([os.environ[HAPROXY], "-vv"], capture_output=True, text=True, check=True)
    assert "HAProxy version" in process.stdout


def test_without_the_program_that_makes_haproxy_safe_there_is_no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: a warning said that clients that leave are not noticed, and Ray's own HAProxy shared connections of clients."""
    monkeypatch.setattr("server.cluster.environment.HAPROXY_PROGRAM", "no-such-program")
    with pytest.raises(StartError, match=r"no-such-program is missing"):
        prepare_environment(Settings())
    monkeypatch.setenv(HAPROXY, "/opt/own/haproxy")  # the operator's own choice holds
    prepare_environment(Settings())


def test_a_variable_that_the_operator_sets_is_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CLIENT_TIMEOUT, "600")
    prepare_environment(Settings())
    assert os.environ[CLIENT_TIMEOUT] == "600"
