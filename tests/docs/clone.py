"""A folder in which the commands of the pages run as in a clone of the repository."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.docs.pages import EXAMPLES, ROOT

KEY_VARIABLES = ("KEY", "LORI_API_KEY")
"""Environment variables that hold a key in the pages."""
FAILING_CURL = 'curl() { command curl --fail-with-body "$@"; }\n'
"""Replacement for `curl -s` in pages that show a refusal, since `curl -s` then ends with exit code 0."""


@dataclass(frozen=True, slots=True)
class Clone:
    """A folder with the packages, the environment as `.venv`, and the examples.

    `texts` maps texts of the pages, such as ports, to their replacements in a test.
    """

    folder: Path
    texts: Mapping[str, str]
    key: str

    def run(self, script: str) -> str:
        """Return the output of a bash script. Raises an error if a command fails."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LORI_")}
        environment |= dict.fromkeys(KEY_VARIABLES, self.key) | {"NO_PROXY": "localhost,127.0.0.1"}
        command = ["bash", "-euo", "pipefail", "-c", FAILING_CURL + self.translate(script)]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def translate(self, text: str) -> str:
        """Return a text of the pages with the replacements of `texts`."""
        pattern = "|".join(map(re.escape, sorted(self.texts, key=len, reverse=True)))
        return re.sub(pattern, lambda match: self.texts[match[0]], text)


def make_clone(folder: Path, texts: Mapping[str, str], key: str = "none") -> Clone:
    """Make a clone in an empty folder."""
    clone = Clone(folder, texts, key)
    (folder / ".venv").symlink_to(sys.prefix)
    for package in ("lori", "server", "training"):
        (folder / package).symlink_to(ROOT / package)
    examples = folder / EXAMPLES.relative_to(ROOT)
    shutil.copytree(EXAMPLES, examples)
    for script in (*examples.rglob("*.py"), *examples.rglob("*.sh")):
        script.write_text(clone.translate(script.read_text(encoding="utf-8")), encoding="utf-8")
    return clone
