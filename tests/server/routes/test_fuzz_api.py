"""A fuzz test: schemathesis reads the API's description and sends requests at the bounds, at random, valid and invalid."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lori.base_model import load_base_model
from lori.store.entry import Entry
from tests.server.forked import start_forked
from tests.server.keyed import ADMIN, bearer, write_keys
from tests.server.live import REPOSITORY, Live
from tests.server.rig import EOS, write_adapters
from tests.tiny import save_tiny_model, tiny_llama_config

HERE = Path(__file__).parent
NUM_EXAMPLES = 2000
PER_OPERATION = 40
"""Random requests per operation, beside those at bounds, from links and from the description's examples."""
LIMIT_S = 600


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Yield a server whose context is so short that no answer takes long. Its client has an admin's key."""
    place = tmp_path_factory.mktemp("fuzz")
    model = save_tiny_model(place / "tiny", tiny_llama_config(EOS + 1, max_position_embeddings=256))
    base = load_base_model(str(model), torch.float32)
    store = write_adapters(place / "adapters", base)
    references = [f"{name}@{Entry(name, store / name).version}" for name in ("math", "safety", "intent")]
    flags = ["--model", str(model), "--adapters", str(place / "adapters"), "--keys", str(write_keys(place))]
    (place / "merges").mkdir()
    flags += ["--merges", str(place / "merges")]
    flags += ["--dtype", "float32", "--threads", "1", "--kv-cache-gib", "0.002", "--max-step-tokens", "48", "--max-batch", "16"]
    with start_forked(place / "log", *flags) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUZZED_MERGE", json.dumps({"base_digest": base.identity.digest, "references": references}))
        server.client.headers.update(bearer(ADMIN))
        yield server


def tried(live: Live, report: Path) -> tuple[str, Counter[int]]:
    """Run schemathesis; return its report of faults, empty if there are none, and the number of replies by status."""
    program = [sys.executable, "-m", "schemathesis.cli", "--no-color", "--config-file", str(HERE / "fuzz.toml")]
    # DELETE /adapters/compare deletes an adapter of that name, so that path allows more methods than described. A deleted name
    # exists again after PUT /adapters/{name}/alias or /v1/load_lora_adapter, which use_after_free does not know.
    excluded = "allow_header_conformance,use_after_free"
    flags = ["--checks", "all", "--exclude-checks", excluded, "--max-examples", str(PER_OPERATION)]
    flags += ["--header", f"Authorization: {bearer(ADMIN)['Authorization']}", "--request-timeout", "60", "--workers", "2"]
    flags += ["--report", "ndjson", "--report-ndjson-path", str(report), "--output-sanitize", "false"]
    flags += ["--generation-deterministic", "--continue-on-failure", "--warnings", "off"]
    ran = subprocess.run(
        [*program, "run", f"{live.url}/openapi.json", *flags],
        cwd=report.parent,  # schemathesis writes its files there
        env={**os.environ, "SCHEMATHESIS_HOOKS": "tests.server.routes.fuzz_hooks", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    answers = Counter[int]()
    for line in report.read_text().splitlines():
        recorded = json.loads(line).get("ScenarioFinished", {}).get("recorder", {}).get("interactions", {})
        answers.update(one["response"]["status_code"] for one in recorded.values() if one.get("response"))
    return "" if ran.returncode == 0 else ran.stdout + ran.stderr, answers


@pytest.mark.slow
def test_the_api_answers_every_request_as_described(fuzzed: Live, tmp_path: Path) -> None:
    wrong, answers = tried(fuzzed, tmp_path / "report.ndjson")
    assert not wrong, wrong
    assert answers.total() >= NUM_EXAMPLES
    assert not [status for status in answers if status >= 500]
    assert answers[200] >= answers.total() / 10, "too few requests were valid"
    assert {401, 404, 405} <= answers.keys()
    fuzzed.wait_for(running=0, waiting=0)
    assert fuzzed.client.get("/ready").status_code == 200
    assert "Traceback" not in fuzzed.log.read_text()
