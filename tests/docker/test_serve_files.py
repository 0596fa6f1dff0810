"""The examples for Ray Serve and KubeRay: the programs, resources and settings that they name exist."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.config import ProxyLocation
from ray.serve.schema import ServeDeploySchema

from server.cluster.deployment import REPLICA, from_config
from server.cluster.environment import HAPROXY, HAPROXY_PROGRAM, PREFERRED

DOCKER = Path(__file__).parents[2] / "docker"


def _serve_configs() -> dict[str, dict[str, Any]]:
    service = yaml.safe_load((DOCKER / "rayservice.yaml").read_text())
    return {
        "serve.yaml": yaml.safe_load((DOCKER / "serve.yaml").read_text()),
        "rayservice.yaml": yaml.safe_load(service["spec"]["serveConfigV2"]),
    }


@pytest.mark.parametrize("file", ["serve.yaml", "rayservice.yaml"])
def test_ray_takes_the_config_and_builds_the_application(file: str) -> None:
    config = ServeDeploySchema.model_validate(_serve_configs()[file])
    assert config.proxy_location == ProxyLocation.HeadOnly, "as `server.cluster.serving` starts it"
    [application] = config.applications
    assert application.import_path == f"{from_config.__module__}:{from_config.__name__}"
    built = from_config(application.args)
    [replica] = built._bound_deployment.init_args
    assert replica._bound_deployment.name == REPLICA
    assert replica._bound_deployment._deployment_config.autoscaling_config.max_replicas == 8


def test_every_container_of_kuberay_has_the_environment_and_a_limit() -> None:
    cluster = yaml.safe_load((DOCKER / "rayservice.yaml").read_text())["spec"]["rayClusterConfig"]
    home = "/opt/lori/venv"
    assert f"ENV PATH={home}/bin:" in (DOCKER / "Dockerfile").read_text()
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        spec = group["template"]["spec"]
        assert spec["securityContext"] == {"runAsNonRoot": True, "runAsUser": 10001}
        [container] = spec["containers"]
        environment = {variable["name"]: variable["value"] for variable in container["env"]}
        assert environment == PREFERRED | {HAPROXY: f"{home}/bin/{HAPROXY_PROGRAM}"}
        assert container["resources"]["limits"]["memory"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}


def test_ray_s_ports_need_a_token_on_kuberay() -> None:
    """Regression: anyone who reached a pod could run code in it. The operator sends the token, too, and does not read `env`."""
    cluster = yaml.safe_load((DOCKER / "rayservice.yaml").read_text())["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert [*map(int, cluster["rayVersion"].split("."))] >= [2, 52, 0], "the operator refuses tokens for older versions"


def test_kuberay_has_room_for_the_greatest_number_of_replicas() -> None:
    config = _serve_configs()["rayservice.yaml"]["applications"][0]["args"]
    cluster = yaml.safe_load((DOCKER / "rayservice.yaml").read_text())["spec"]["rayClusterConfig"]
    [group] = cluster["workerGroupSpecs"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert (group["minReplicas"], group["maxReplicas"]) == (config["replicas"], config["max_replicas"])
    [container] = group["template"]["spec"]["containers"]
    assert int(container["resources"]["requests"]["cpu"]) == config["replica_cpus"]


@pytest.mark.parametrize("name", ["host", "port", "ray_address"])
def test_settings_of_the_cluster_are_no_arguments_of_the_application(name: str) -> None:
    with pytest.raises(ValueError, match=f"args: {name}"):
        from_config({name: "9000"})
