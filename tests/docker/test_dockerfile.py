"""The image's layer with the model is built from the modules that make it, and no others: a change elsewhere makes none anew."""

import re
import subprocess
import sys

from tests.server.live import REPOSITORY

COPIED = re.compile(r"^COPY ((?:lori/\w+\.py )+)lori/$", re.MULTILINE)


def test_what_makes_the_model_is_copied_whole() -> None:
    (copied,) = COPIED.findall((REPOSITORY / "docker" / "Dockerfile").read_text())
    program = "import sys, lori.embedded; print(*(name for name in sys.modules if name.partition('.')[0] == 'lori'))"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout.split()
    files = {f"{name.replace('.', '/')}.py" for name in loaded if name != "lori"} | {"lori/__init__.py"}
    assert set(copied.split()) == files
