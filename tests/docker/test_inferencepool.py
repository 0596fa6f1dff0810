"""The example for the Gateway API's inference extension: its objects refer to each other and to the server. No cluster runs."""

from typing import Any

from server.settings import Settings
from tests.docker.inferencepool import ENGINE, OBJECTS, PARAMETERS, PICKER

POOL = OBJECTS["InferencePool", "lori-server"]["spec"]
SERVER = OBJECTS["Deployment", "lori-server"]["spec"]["template"]
CHOOSER = OBJECTS["Deployment", "lori-server-picker"]["spec"]["template"]


def container(pod: dict[str, Any]) -> dict[str, Any]:
    """Return a pod's only container."""
    containers: list[dict[str, Any]] = pod["spec"]["containers"]
    [only] = containers
    return only


def test_the_route_leads_to_the_pool_and_the_pool_to_the_servers() -> None:
    [rule] = OBJECTS["HTTPRoute", "lori-server"]["spec"]["rules"]
    assert rule["timeouts"] == {"request": "0s"}, "the Gateway API reads 0s as no timeout"
    [backend] = rule["backendRefs"]
    assert (backend["kind"], backend["name"]) in OBJECTS
    assert OBJECTS[backend["kind"], backend["name"]]["apiVersion"].startswith(backend["group"] + "/")
    assert POOL["selector"]["matchLabels"].items() <= SERVER["metadata"]["labels"].items()
    [port] = container(SERVER)["ports"]
    assert [{"number": port["containerPort"]}] == POOL["targetPorts"]
    assert port["containerPort"] == Settings.model_fields["port"].default


def test_the_pool_asks_the_deployed_picker() -> None:
    service = OBJECTS["Service", POOL["endpointPickerRef"]["name"]]["spec"]
    [port] = service["ports"]
    assert port["port"] == POOL["endpointPickerRef"]["port"]["number"]
    assert service["selector"].items() <= CHOOSER["metadata"]["labels"].items()
    picker = container(CHOOSER)
    assert port["targetPort"] in {one["name"] for one in picker["ports"]}
    args = dict(arg.removeprefix("--").split("=", 1) for arg in picker["args"])
    assert ("InferencePool", args["pool-name"]) in OBJECTS
    [mount], [volume] = picker["volumeMounts"], CHOOSER["spec"]["volumes"]
    folder, _, file = args["config-file"].rpartition("/")
    assert (mount["name"], mount["mountPath"]) == (volume["name"], folder)
    assert file in OBJECTS["ConfigMap", volume["configMap"]["name"]]["data"]


def test_the_picker_may_read_the_resources_that_it_watches() -> None:
    account = CHOOSER["spec"]["serviceAccountName"]
    assert ("ServiceAccount", account) in OBJECTS
    binding = OBJECTS["RoleBinding", account]
    assert [subject["name"] for subject in binding["subjects"]] == [account]
    rules = OBJECTS["Role", binding["roleRef"]["name"]]["rules"]
    assert {resource for rule in rules for resource in rule["resources"]} >= {"pods", "inferencepools"}


def test_every_scorer_of_the_profile_is_configured() -> None:
    [profile] = PICKER["schedulingProfiles"]
    assert {plugin["pluginRef"] for plugin in profile["plugins"]} == {name for name in PARAMETERS if name.endswith("-scorer")}
    assert PARAMETERS["core-metrics-extractor"]["defaultEngine"] == ENGINE["name"]


def test_the_server_gets_only_settings_that_it_knows() -> None:
    server = container(SERVER)
    known = {f"LORI_{name.upper()}" for name in Settings.model_fields}
    assert {variable["name"] for variable in server["env"]} <= known
    assert "LORI_OPEN_METRICS" in known
    assert {"name": "LORI_THREADS", "value": server["resources"]["requests"]["cpu"]} in server["env"]
    assert {server[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe")} == {"/ready"}
    assert server["livenessProbe"]["httpGet"]["path"] == "/health"
    assert SERVER["spec"]["securityContext"] == {"runAsNonRoot": True, "runAsUser": 10001}
    assert server["securityContext"]["readOnlyRootFilesystem"] is True
    assert server["resources"]["limits"]["memory"]
    settings = Settings()
    assert SERVER["spec"]["terminationGracePeriodSeconds"] > settings.drain_notice_s + settings.drain_s
    assert server["readinessProbe"]["periodSeconds"] < settings.drain_notice_s
    mounted = {mount["mountPath"] for mount in server["volumeMounts"]}
    assert {variable["value"] for variable in server["env"] if variable["name"] == "LORI_ADAPTERS"} <= mounted
