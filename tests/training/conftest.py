"""Fixtures for the tests of `training`."""

import json
from pathlib import Path

import pytest

WORDS = ["red", "blue", "green", "black", "white"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "colours.jsonl"
    rows = [{"prompt": f"Say {word} {i}:", "completion": f" {word}"} for i in range(6) for word in WORDS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
