"""What the compose files promise: nothing runs as root or can be written that need not be, and no port is open by itself."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

DOCKER = Path(__file__).parents[2] / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
MONITORING = DOCKER / "monitoring"


class ComposeLoader(yaml.SafeLoader):
    """Knows compose's mark of what replaces, and is not added to, a list of the file before."""


ComposeLoader.add_constructor("!override", lambda loader, node: loader.construct_sequence(node))


def read(path: Path) -> Any:
    """Returns what a YAML file says."""
    return yaml.load(path.read_text(), ComposeLoader)


MAIN, KEYS, GPU = (read(DOCKER / f"compose{name}.yaml") for name in ("", ".keys", ".gpu"))
SERVICES: dict[str, dict[str, Any]] = MAIN["services"]
SERVER = SERVICES["server"]


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Returns what is mounted where, without modes."""
    parts = (re.fullmatch(r"(\$\{[^}]*\}|[^:]+):([^:]+)(:ro)?", one) for one in service["volumes"])
    return {found[2]: found[1] for found in parts if found}


@pytest.mark.parametrize("name", SERVICES)
def test_services_can_write_and_do_little(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    assert not {"privileged", "user", "network_mode", "cap_add", "devices", "gpus", "deploy"} & set(service)


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_published_on_this_machine_alone(name: str) -> None:
    assert SERVICES[name]["ports"]
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name]["ports"])


def test_only_the_server_runs_without_a_profile() -> None:
    assert {name: service.get("profiles") for name, service in SERVICES.items()} == {
        "server": None,
        "prometheus": ["monitoring"],
        "grafana": ["monitoring"],
    }
    assert all(re.search(r":v?\d+\.\d+\.\d+$", SERVICES[name]["image"]) for name in ("prometheus", "grafana"))


def test_the_server_is_asked_whether_it_is_ready() -> None:
    assert '"/ready"' in SERVER["healthcheck"]["test"][-1]
    assert SERVER["restart"] == "unless-stopped"


def test_the_image_runs_as_a_user_who_owns_the_cache() -> None:
    last = DOCKERFILE.rpartition("\nFROM ")[2]
    assert "--uid 10001" in last
    assert re.findall(r"^USER (\w+)$", last, re.MULTILINE) == ["lori"]
    assert "install --directory --owner lori /cache" in last
    for variable in ("HF_HOME", "TRITON_CACHE_DIR"):
        assert f" {variable}=/cache/" in last
    assert mounts(SERVER)["/cache"] in MAIN["volumes"]
    assert any(volume.endswith(":/adapters:ro") for volume in SERVER["volumes"])


def test_a_server_for_other_machines_has_keys() -> None:
    server = KEYS["services"]["server"]
    [port] = server["ports"]
    assert not port.startswith("127.0.0.1:")
    [secret] = server["secrets"]
    assert server["environment"] == {"LORI_KEYS": f"/run/secrets/{secret}"}
    assert secret in KEYS["secrets"]


def test_prometheus_has_a_key_where_the_server_has_keys() -> None:
    prometheus = KEYS["services"]["prometheus"]
    assert mounts(prometheus).keys() < mounts(SERVICES["prometheus"]).keys()
    [secret] = prometheus["secrets"]
    assert secret in KEYS["secrets"]
    plain, keyed = (read(MONITORING / f"prometheus{name}.yml") for name in ("", "-keys"))
    authorization = keyed["scrape_configs"][0].pop("authorization")
    assert authorization == {"credentials_file": f"/run/secrets/{secret}"}
    assert keyed == plain


def test_a_gpu_is_reserved_by_its_own_file_alone() -> None:
    server = GPU["services"]["server"]
    [device] = server["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert server["image"] != SERVER["image"]
    arguments = server["build"]["args"]
    assert "gcc" in arguments["PACKAGES"]
    assert arguments["EXTRAS"].split()[0] == "gpu"
    assert not arguments["TORCH_INDEX"]
    assert all(f"ARG {name}=" in DOCKERFILE for name in arguments)


def test_what_is_mounted_is_there() -> None:
    for service in (*SERVICES.values(), *KEYS["services"].values()):
        for source in mounts(service).values() if "volumes" in service else ():
            assert source.startswith("${") or source in MAIN["volumes"] or (DOCKER / source).exists(), source


def test_grafana_finds_its_dashboard_and_that_its_source() -> None:
    mounted = mounts(SERVICES["grafana"])
    [provider] = read(MONITORING / "grafana-dashboards.yml")["providers"]
    folder = provider["options"]["path"]
    file = DOCKER / mounted[folder] / "lori-server.json"
    assert SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == f"{folder}/{file.name}"
    [source] = read(MONITORING / "grafana-datasource.yml")["datasources"]
    panels = json.loads(file.read_text())["panels"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert source["jsonData"]["timeInterval"] == read(MONITORING / "prometheus.yml")["global"]["scrape_interval"]
    assert source["url"] == "http://prometheus:9090"
