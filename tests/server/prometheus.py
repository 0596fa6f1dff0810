"""Debian's Prometheus as a process that scrapes the tests' servers."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import yaml

from tests.needs import need
from tests.server.live import LIMIT_S, REPOSITORY, wait_until

MONITORING = REPOSITORY / "docker" / "monitoring"
ADDRESS = re.compile(r'msg="Listening on" address=(127\.0\.0\.1:\d+)')


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A running Prometheus that answers queries."""

    client: httpx.Client

    def ask(self, query: str) -> list[float]:
        """Return the value of each series of the query's result."""
        reply = self.client.get("/api/v1/query", params={"query": query})
        assert reply.status_code == 200, f"{query}: {reply.text}"
        return [float(series["value"][1]) for series in reply.json()["data"]["result"]]

    def wait_for(self, query: str, value: float) -> None:
        """Wait until the query's only series has this value."""
        wait_until(lambda: self.ask(query) == [value], f"{query} to be {value}")


def point_at(config: str, port: int, credentials: Path | None = None) -> str:
    """Return the text of one of our configs, changed to scrape a test's server instead of compose's, once a second."""
    document = yaml.safe_load((MONITORING / config).read_text())
    document["global"]["scrape_interval"] = "1s"
    [job] = document["scrape_configs"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
    if credentials:
        job["authorization"]["credentials_file"] = str(credentials)
    text: str = yaml.safe_dump(document)
    return text


@contextmanager
def scraping(config: str, folder: Path) -> Iterator[Prometheus]:
    """Run Prometheus on a free port until the block ends, with its files in `folder`. Skip the test if it is not installed."""
    need("prometheus")
    (folder / "prometheus.yml").write_text(config)
    log = folder / "log"
    flags = ["--config.file", str(folder / "prometheus.yml"), "--storage.tsdb.path", str(folder / "data")]
    command = ["prometheus", *flags, "--web.listen-address", "127.0.0.1:0"]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: process.poll() is not None or ADDRESS.search(log.read_text()) is not None, "Prometheus")
        match = ADDRESS.search(log.read_text())
        assert match, log.read_text()
        with httpx.Client(base_url=f"http://{match[1]}", timeout=LIMIT_S) as client:
            wait_until(lambda: client.get("/-/ready").status_code == httpx.codes.OK, "Prometheus to be ready")
            yield Prometheus(client)
    finally:
        process.kill()
        process.wait()
