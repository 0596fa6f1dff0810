"""Reads compose's files."""

from pathlib import Path
from typing import Any

import yaml


class ComposeLoader(yaml.SafeLoader):
    """Knows compose's marks of what replaces, or takes away, what the file before says."""


ComposeLoader.add_constructor("!override", lambda loader, node: loader.construct_sequence(node))
ComposeLoader.add_constructor("!reset", lambda loader, node: loader.construct_sequence(node))


def read(path: Path) -> Any:
    """Returns what a YAML file says."""
    return yaml.load(path.read_text(), ComposeLoader)
