"""The program that becomes Ray's HAProxy: its changes to Ray's configuration."""

from pathlib import Path

import pytest
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

from server.cluster.haproxy import RULES, ConfigurationError, harden, hardened

CONFIGURATION = """frontend prometheus
    bind :9101
frontend http_frontend
    bind 127.0.0.1:8000
    http-request set-log-level debug if routes
backend default_backend
    http-request return status 404
backend lori-server
    http-reuse always
    server one 127.0.0.1:30000 check
"""


def test_upgrades_are_dropped_and_no_two_clients_share_a_connection() -> None:
    lines = hardened(CONFIGURATION)
    assert f"    bind 127.0.0.1:8000\n{RULES}    http-request set-log-level" in lines
    assert "http-reuse always" not in lines
    assert "http-reuse never" in lines


def test_rays_own_template_has_the_frontend_that_is_changed() -> None:
    """Check the installed Ray, since with another one the program must not start HAProxy unchanged."""
    assert "frontend http_frontend\n    bind " in HAPROXY_CONFIG_TEMPLATE
    assert RULES in hardened(HAPROXY_CONFIG_TEMPLATE)


def test_a_configuration_is_changed_only_once(tmp_path: Path) -> None:
    path = tmp_path / "haproxy.cfg"
    path.write_text(CONFIGURATION)
    harden(["-db", "-f", str(path), "-dR"])
    harden(["-db", "-f", str(path), "-sf", "17"])
    assert path.read_text() == hardened(CONFIGURATION)
    assert [*tmp_path.iterdir()] == [path]


def test_a_configuration_without_the_frontend_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="0 frontends"):
        hardened("frontend other\n    bind :80\n")


def test_a_configuration_without_an_application_is_changed() -> None:
    start, _, _ = CONFIGURATION.partition("backend lori-server")
    assert RULES in hardened(start)


@pytest.mark.parametrize("reuse", ["", "http-reuse aggressive"])
def test_connections_that_are_shared_in_another_way_are_refused(reuse: str) -> None:
    with pytest.raises(ConfigurationError, match="http-reuse always"):
        hardened(CONFIGURATION.replace("http-reuse always", reuse))
