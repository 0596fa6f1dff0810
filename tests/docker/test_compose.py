"""Promises of the compose files: no service runs as root or writes without need, and no port is open to others by default."""

import json
import re
import tomllib
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import urlsplit

import pytest

from server.access.hosts import AllowedHosts
from server.plan.speed import OVERHEAD_GIB
from server.settings import Settings
from tests.docker.compose import read
from tests.docker.inferencepool import OBJECTS

DOCKER = Path(__file__).parents[2] / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
MONITORING = DOCKER / "monitoring"


MAIN, KEYS, GPU, ROUTER = (read(DOCKER / f"compose{name}.yaml") for name in ("", ".keys", ".gpu", ".router"))
SERVICES: dict[str, dict[str, Any]] = MAIN["services"]
SERVER = SERVICES["server"]
ROUTED = ROUTER["services"]["router"]
ALL = {**SERVICES, "router": ROUTED}


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Return the sources of a service's mounts by their targets, without modes."""
    parts = (re.fullmatch(r"(\$\{[^}]*\}|[^:]+):([^:]+)(?::ro|:\$\{[^}]*\})?", one) for one in service["volumes"])
    return {match[2]: match[1] for match in parts if match}


@pytest.mark.parametrize("service", ALL.values(), ids=ALL)
def test_services_have_a_read_only_root_and_few_privileges(service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    assert not {"privileged", "user", "network_mode", "cap_add", "devices", "gpus", "deploy"} & set(service)


@pytest.mark.parametrize("service", ALL.values(), ids=ALL)
def test_ports_are_published_on_this_machine_alone(service: dict[str, Any]) -> None:
    assert service["ports"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_only_the_server_runs_without_a_profile() -> None:
    assert {name: service.get("profiles") for name, service in SERVICES.items()} == {
        "server": None,
        "prometheus": ["monitoring"],
        "grafana": ["monitoring"],
    }
    assert all(re.search(r":v?\d+\.\d+\.\d+$", SERVICES[name]["image"]) for name in ("prometheus", "grafana"))


def test_the_health_check_of_the_server_asks_for_readiness() -> None:
    assert '"/ready"' in SERVER["healthcheck"]["test"][-1]


@pytest.mark.parametrize("service", ALL.values(), ids=ALL)
def test_services_that_end_are_restarted(service: dict[str, Any]) -> None:
    """Restart on exit: a server whose engine died exits, and compose restarts nothing that is only unhealthy."""
    assert service["restart"] == "unless-stopped"


def test_servers_answer_to_the_names_that_they_are_reached_by() -> None:
    """Check LORI_ALLOW_HOST: servers without keys answer to no other names."""
    names = {"COMPOSE_PROJECT_NAME": "lori"}
    [target] = read(MONITORING / "prometheus.yml")["scrape_configs"][0]["static_configs"][0]["targets"]
    urls = [flag for flag in ROUTED["command"] if flag.startswith("http://")]
    for server, used in ((SERVER, [f"http://{target}"]), (ROUTER["services"]["server"], urls)):
        given = server["environment"]["LORI_ALLOW_HOST"]
        assert given.endswith("${LORI_ALLOW_HOST:+,${LORI_ALLOW_HOST:-}}"), "the operator may add names"
        allowed = AllowedHosts(Template(given.partition("${LORI_ALLOW_HOST")[0]).substitute(names).split(","))
        for url in used:
            assert allowed.includes(urlsplit(Template(url).substitute(names)).netloc), url
        assert not allowed.includes("page.example")


def test_the_image_runs_as_a_user_who_owns_the_cache() -> None:
    last = DOCKERFILE.rpartition("\nFROM ")[2]
    assert "--uid 10001" in last
    assert re.findall(r"^USER (\w+)$", last, re.MULTILINE) == ["lori"]
    assert "install --directory --owner lori /adapters /cache" in last
    for variable in ("HF_HOME", "TRITON_CACHE_DIR", "LORI_ADAPTER_CACHE"):
        assert f" {variable}=/cache/" in last
    assert mounts(SERVER)["/cache"] in MAIN["volumes"]
    for folder in ("adapters", "merges"):
        assert f"${{LORI_{folder.upper()}:-no-{folder}}}:/{folder}:${{LORI_{folder.upper()}_MODE:-ro}}" in SERVER["volumes"]
        assert f"no-{folder}" in MAIN["volumes"]


def test_compose_from_the_root_starts_the_same_services() -> None:
    assert read(DOCKER.parent / "compose.yaml") == {"name": MAIN["name"], "include": ["docker/compose.yaml"]}


def test_extras_that_readme_offers_can_be_built_in() -> None:
    page = (DOCKER.parent / "docs" / "deployment.md").read_text(encoding="utf-8")
    [offered] = re.findall(r"^\| `LORI_EXTRAS` \| [^:]*: (.*) \|$", page, re.MULTILINE)
    [known] = re.findall(r"if name in \(([^)]*)\)", DOCKERFILE)
    extras = tomllib.loads((DOCKER.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"`(\w+)`", offered)) < set(re.findall(r'"(\w+)"', known)) <= set(extras)


def test_a_server_with_its_defaults_grows_no_larger_than_its_container() -> None:
    """Regression: with 4 GiB the system would have killed the server after some 530 adapters had been used."""
    settings = Settings()
    weights, held = 0.31, 1.62  # the figure at 1.0 of `server.plan.speed.HELD_FACTOR`
    grown = weights + OVERHEAD_GIB + settings.kv_cache_gib + settings.loaded_gib + held * settings.resident_gib
    [limit] = re.findall(r"^\$\{LORI_MEMORY:-(\d+)g\}$", SERVER["mem_limit"])
    pod = OBJECTS["Deployment", "lori-server"]["spec"]["template"]["spec"]["containers"][0]
    assert pod["resources"]["limits"] == {"memory": f"{limit}Gi"}
    assert 1.1 * grown < float(limit)


def test_budgets_of_memory_are_passed_on() -> None:
    page = (DOCKER.parent / "docs" / "deployment.md").read_text(encoding="utf-8")
    [row] = re.findall(r"^\| `LORI_MEMORY` \|(.*)$", page, re.MULTILINE)
    named = set(re.findall(r"`(LORI_\w+)`", row))
    assert {"LORI_KV_CACHE_GIB", "LORI_LOADED_GIB", "LORI_RESIDENT_GIB"} == named <= set(SERVER["environment"])


def test_adapters_are_at_an_address_or_in_the_folder_that_is_mounted() -> None:
    assert SERVER["environment"]["LORI_MERGES"] == "/merges"
    assert SERVER["environment"]["LORI_ADAPTERS"] == "${LORI_ADAPTERS_URL:-/adapters}"
    [default] = re.findall(r"^\$\{LORI_ADAPTERS:-([^}]+)\}$", mounts(SERVER)["/adapters"])
    assert default in MAIN["volumes"]
    assert default != "adapters", "a folder's name without ./ would be the empty volume, not an error"


def test_a_server_for_other_machines_has_keys() -> None:
    server = KEYS["services"]["server"]
    [port] = server["ports"]
    assert not port.startswith("127.0.0.1:")
    [secret] = server["secrets"]
    assert server["environment"] == {"LORI_KEYS": f"/run/secrets/{secret}"}
    assert secret in KEYS["secrets"]


def test_the_router_has_the_port_and_knows_each_server() -> None:
    server = ROUTER["services"]["server"]
    assert server["ports"] == []
    assert ROUTED["ports"] == SERVER["ports"]
    urls = [f"http://${{COMPOSE_PROJECT_NAME}}-server-{number}:8000" for number in range(1, server["scale"] + 1)]
    command = ROUTED["command"]
    place = command.index("--worker-urls") + 1
    assert command[place : place + len(urls)] == urls
    assert command[place + len(urls)].startswith("--")


def test_servers_on_one_machine_share_its_cores() -> None:
    """Check LORI_THREADS: by default each server would start a thread for every core."""
    assert "LORI_THREADS" in SERVER["environment"]
    assert ROUTER["services"]["server"]["environment"]["LORI_THREADS"] == "${LORI_THREADS:-1}"


def test_the_router_is_the_one_that_the_tests_run() -> None:
    [wanted] = re.findall(r'install .*"(vllm-router[^"]*)"', ROUTED["build"]["dockerfile_inline"])
    extras = tomllib.loads((DOCKER.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert [one.partition(";")[0] for one in extras["test"] if one.startswith("vllm-router")] == [wanted]


def test_readme_starts_the_router_as_compose_does() -> None:
    page = (DOCKER.parent / "docs" / "deployment.md").read_text(encoding="utf-8")
    [line] = [line for line in page.splitlines() if re.match(r"(\w+=\w+ )*vllm-router ", line)]
    assert line.partition("vllm-router")[0].split() == [f"{name}={value}" for name, value in ROUTED["environment"].items()]
    flags = {flag for flag in ROUTED["command"] if flag.startswith("--") and not flag.startswith(("--host=", "--port="))}
    assert {word for word in line.split() if word.startswith("--")} == flags


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


def test_mounted_files_exist() -> None:
    for service in (*SERVICES.values(), *KEYS["services"].values()):
        for source in mounts(service).values() if "volumes" in service else ():
            assert source.startswith("${") or source in MAIN["volumes"] or (DOCKER / source).exists(), source


def test_grafana_finds_its_dashboard_and_the_dashboard_its_source() -> None:
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
