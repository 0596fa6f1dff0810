"""The examples that start servers or change adapters, and the pages' requests with an admin's key."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from server.keys import append
from server.transport.sockets import free_port
from tests.docs.clone import Clone, make_clone
from tests.docs.pages import EXAMPLES, admin_curls
from tests.needs import need
from tests.server.keyed import bearer
from tests.server.live import LIMIT_S, wait_until

pytestmark = pytest.mark.slow

CLIENTS = {"merging.py", "openai_client.py"}
"""Examples that `tests/test_docs.py` runs."""
SCRIPTS = {"train_your_own/run.sh", "two_processes/ask.py", "two_processes/start.sh"}
"""Examples that are run here."""
FIGURE = re.compile(r"^exact_match +([\d.]+)", re.MULTILINE)
ANSWERED = re.compile(r"^  \S+: (\d) at the first server, (\d) at the second", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two servers and their router, started by the example."""

    clone: Clone
    one: httpx.Client
    two: httpx.Client

    def clone_of_one(self, folder: Path) -> Clone:
        """Return a clone whose server on port 8000 is the first of the two."""
        texts = {"one:8000": self.one.base_url.netloc.decode(), "two:8000": self.two.base_url.netloc.decode()}
        return make_clone(folder, texts | {"localhost:8000": texts["one:8000"]}, self.clone.key)


@contextmanager
def started(clone: Clone, log: Path) -> Iterator[None]:
    """Run the example's `start.sh` until the block ends, in a session of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LORI_")}
    ready = clone.translate("ready on http://localhost:8000")
    with log.open("wb") as file:
        command = clone.folder / "docs" / "examples" / "two_processes" / "start.sh"
        process = subprocess.Popen(
            [command], cwd=clone.folder, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until(lambda: process.poll() is not None or ready in log.read_text(), "the two servers and the router", 3 * LIMIT_S)
        assert process.poll() is None, log.read_text()
        yield
        process.terminate()
        assert process.wait(LIMIT_S) == -signal.SIGTERM, "the script ends by the signal, after its servers"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    need("vllm-router")
    folder = tmp_path_factory.mktemp("pair")
    router, one, two, metrics = (str(free_port()) for _ in range(4))
    texts = {"--port=8000": f"--port={router} --prometheus-port={metrics}", "8000": router, "8001": one, "8002": two}
    (folder / "adapters").mkdir()
    key = append(folder / "keys.toml", "admin", None, None).key
    clone = make_clone(folder, texts, key)
    with started(clone, folder / "log"):
        clients = (httpx.Client(base_url=f"http://localhost:{port}", headers=bearer(key), timeout=LIMIT_S) for port in (one, two))
        with next(clients) as first, next(clients) as second:
            yield Pair(clone, first, second)
    for client in (one, two, router):
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://localhost:{client}/ready")


def test_requests_stay_with_the_server_that_has_their_adapters(pair: Pair) -> None:
    output = pair.clone.run(".venv/bin/python docs/examples/two_processes/ask.py")
    counts = [sorted(map(int, counts)) for counts in ANSWERED.findall(output)]
    assert counts == [[0, 4]] * 5, output


def test_an_adapter_is_trained_on_own_rows_and_published(pair: Pair, tmp_path: Path) -> None:
    output = pair.clone_of_one(tmp_path).run("docs/examples/train_your_own/run.sh")
    base, adapter = map(float, FIGURE.findall(output))
    assert base < 0.5 < adapter
    detail = pair.one.get("/adapters/tickets").json()
    assert output.count(f'"version":"{detail["version"]}"') == 3, "the upload's reply, and both requests'"
    assert detail["templates"] == ["plain"]
    assert "exact_match" in detail["card"]


def test_an_admins_requests_reach_each_server(pair: Pair, tmp_path: Path) -> None:
    clone = pair.clone_of_one(tmp_path)
    for block in admin_curls():
        clone.run(block.text)
    versions = {client.get("/adapters/sums").json()["version"] for client in (pair.one, pair.two)}
    assert versions == {pair.one.get("/adapters/math").json()["version"]}
    assert pair.one.get("/adapters/sums").json()["is_pinned"]


def test_each_example_is_run() -> None:
    scripts = [path for path in EXAMPLES.rglob("*") if path.suffix in (".py", ".sh")]
    assert {str(path.relative_to(EXAMPLES)) for path in scripts} == CLIENTS | SCRIPTS


@pytest.mark.parametrize("name", sorted(CLIENTS | SCRIPTS))
def test_an_example_is_short(name: str) -> None:
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) <= 60
