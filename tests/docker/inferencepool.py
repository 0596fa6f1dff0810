"""The objects of docker/inferencepool.yaml, by kind and name."""

from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).parents[2] / "docker" / "inferencepool.yaml"
OBJECTS: dict[tuple[str, str], dict[str, Any]] = {
    (one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(FILE.read_text())
}
PICKER: dict[str, Any] = yaml.safe_load(OBJECTS["ConfigMap", "lori-server-picker"]["data"]["picker.yaml"])
PARAMETERS: dict[str, dict[str, Any]] = {plugin["type"]: plugin.get("parameters", {}) for plugin in PICKER["plugins"]}
[ENGINE] = PARAMETERS["core-metrics-extractor"]["engineConfigs"]
"""The metric of each quantity that the endpoint picker reads."""
