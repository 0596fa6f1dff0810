"""Compose's profile `monitoring`: a real Prometheus scrapes the server, and every panel of the dashboard has its series."""

import json
import math
import re
import subprocess
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from transformers import PreTrainedTokenizerFast

from tests.server.forked import start_forked
from tests.server.keyed import MONITOR, make_service, served, write_keys
from tests.server.live import Live, wait_until
from tests.server.prometheus import MONITORING, Prometheus, point_at, scraping

DASHBOARD = json.loads((MONITORING / "dashboards" / "lori-server.json").read_text())
QUERIES = {
    f"{panel['title']}, {target['legendFormat']}": target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]
}
METRIC = re.compile(r"\b(?:vllm|lori):\w+")


def ask_for_everything(server: Live) -> None:
    """Send a request of each kind that a panel shows."""
    server.generate(prompt="base", max_tokens=4)
    server.generate(prompt="one", adapter="math", max_tokens=4)
    server.generate(prompt="both", adapter=["math", "safety"], weights=[1, 0.5], max_tokens=4)
    body = {"prompt": "stream", "adapter": "intent", "max_tokens": 4, "stream": True}
    assert "event: done" in server.client.post("/generate", json=body).text
    assert server.client.post("/generate", json={"prompt": "", "adapter": "unknown"}).status_code == 404


def has_value(prometheus: Prometheus, query: str) -> bool:
    """Return whether a panel would draw something. The range covers all scrapes, so no rate depends on the machine's speed."""
    return any(math.isfinite(value) for value in prometheus.ask(query.replace("$__rate_interval", "1h")))


@pytest.mark.needs("prometheus")
@pytest.mark.parametrize("config", ["prometheus.yml", "prometheus-keys.yml"])
def test_prometheus_takes_the_config(config: str) -> None:
    # --syntax-only, since the key's file does not exist on this machine.
    command = ["promtool", "check", "config", "--syntax-only", str(MONITORING / config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_metric_of_the_dashboard_is_the_server_s(live: Live) -> None:
    ask_for_everything(live)
    families = text_string_to_metric_families(live.client.get("/metrics").text)
    exposed = {sample.name for family in families for sample in family.samples}
    asked = {name for query in QUERIES.values() for name in METRIC.findall(query)}
    assert len(asked) > 20
    assert asked - exposed == set()


@pytest.mark.slow
def test_every_panel_has_a_series(writer_model: Path, adapters: Path, tmp_path: Path) -> None:
    flags = ["--model", str(writer_model), "--adapters", str(adapters), "--dtype", "float32", "--threads", "1"]
    with (
        start_forked(tmp_path / "server.log", *flags) as server,
        scraping(point_at("prometheus.yml", server.port), tmp_path) as prometheus,
    ):
        prometheus.wait_for("up", 1)
        prometheus.wait_for("sum(vllm:generation_tokens_total)", 0)
        ask_for_everything(server)
        prometheus.wait_for("sum(vllm:generation_tokens_total)", 16)
        for name, query in QUERIES.items():
            wait_until(lambda query=query: has_value(prometheus, query), f"{name}: {query}")
        prometheus.wait_for(QUERIES["Adapters, registered"], 3)


@pytest.mark.slow
def test_prometheus_scrapes_a_server_with_keys(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    credentials = tmp_path / "monitor.key"
    credentials.write_text("lori_wrong-key\n")
    with served(make_service(tokenizer, write_keys(tmp_path))) as client:
        config = point_at("prometheus-keys.yml", client.base_url.port or 0, credentials)
        with scraping(config, tmp_path) as prometheus:
            prometheus.wait_for("up", 0)
            credentials.write_text(MONITOR + "\n")
            prometheus.wait_for("up", 1)
