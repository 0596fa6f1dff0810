"""The Dockerfile: the model's layer depends only on the modules that build it, and the first process handles every SIGTERM."""

import json
import re
import subprocess
import sys

import pytest

from tests.server.live import REPOSITORY

DOCKERFILE = (REPOSITORY / "docker" / "Dockerfile").read_text()
COPIED = re.compile(r"^COPY ((?:lori/\w+\.py )+)lori/$", re.MULTILINE)


@pytest.mark.slow
def test_the_model_s_layer_copies_every_module_that_builds_the_model() -> None:
    (copied,) = COPIED.findall(DOCKERFILE)
    program = "import sys, lori.embedded; print(*(name for name in sys.modules if name.partition('.')[0] == 'lori'))"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout.split()
    files = {f"{name.replace('.', '/')}.py" for name in loaded if name != "lori"} | {"lori/__init__.py"}
    assert set(copied.split()) == files


def test_the_first_process_passes_signals_on_while_the_server_imports() -> None:
    """Regression: Linux withholds signals from a first process without a handler, so `docker stop` killed a starting server."""
    [command] = re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)
    assert json.loads(command) == ["tini", "--", "python", "-m", "server"]
    assert re.search(r"apt-get install .* tini ", DOCKERFILE.rpartition("\nFROM ")[2])
