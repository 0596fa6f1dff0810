"""A reader of compose files."""

from pathlib import Path
from typing import Any

import yaml


class ComposeLoader(yaml.SafeLoader):
    """YAML loader that knows compose's tags: `!override` replaces a value of the file before, and `!reset` removes it."""


ComposeLoader.add_constructor("!override", lambda loader, node: loader.construct_sequence(node))
ComposeLoader.add_constructor("!reset", lambda loader, node: loader.construct_sequence(node))


def read(path: Path) -> Any:
    """Return the content of a YAML file."""
    return yaml.load(path.read_text(), ComposeLoader)
