"""`training.calibrate`: statistics of an adapter's prompts, beside the adapter."""

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from lori.auto_weights import shares
from lori.base_model import BaseModel, load_base_model
from lori.errors import AdapterError
from lori.format import read_config
from lori.prompt_statistics import STATISTICS_FILE, Background, fit_background, load_background
from lori.store.entry import Entry
from tests.server.rig import write_adapter
from tests.training.runs import random_texts
from training import calibrate, prompt_statistics
from training.calibrate import CalibrateConfig
from training.data import DataError
from training.prompt_features import prompt_features
from training.prompt_statistics import MIN_ROWS, MIN_WEIGHT

Rows = Sequence[Mapping[str, object]]


def rows(count: int = 150, letters: str = string.digits, **fields: object) -> Rows:
    answers = random_texts(count, string.ascii_letters, seed=1)
    return [
        {"prompt": prompt, "completion": text} | fields
        for prompt, text in zip(random_texts(count, letters), answers, strict=True)
    ]


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return load_base_model(str(tiny_model), torch.float32, "eager")


@pytest.fixture(scope="module")
def place(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an adapter that was trained on plain prompts, and a background."""
    place = tmp_path_factory.mktemp("calibrate")
    write_adapter(place / "math", base, seed=1, templates=("plain",))
    background = fit_background(base.identity.digest, [prompt_features(base, random_texts(300, string.ascii_lowercase))])
    (place / "background.safetensors").write_bytes(background.to_bytes())
    return place


def config(place: Path, model: Path, *forms: Rows) -> CalibrateConfig:
    """Return the config for these forms of rows, whose files are written to `place`."""
    files = [place / f"{index}.jsonl" for index in range(len(forms))]
    for file, form in zip(files, forms, strict=True):
        file.write_text("".join(json.dumps(row) + "\n" for row in form))
    return CalibrateConfig.model_validate(
        {
            "adapter": place / "math",
            "data": list(map(str, files)),
            "background": place / "background.safetensors",
            "model": str(model),
            "dtype": "float32",
        }
    )


def test_the_statistics_are_those_of_the_adapter_s_prompts(tiny_model: Path, base: BaseModel, place: Path) -> None:
    settings = config(place, tiny_model, rows(), rows(letters="XYZ"))
    message = calibrate.calibrate(settings)
    file = place / "math" / STATISTICS_FILE
    assert message == f"wrote {file}, {file.stat().st_size} bytes: 300 prompts in 2 forms"
    statistics = Entry("math", place / "math").prompt_statistics(read_config(place / "math").lori.content_digest)
    background = load_background(base.identity, settings.background)
    assert statistics is not None
    assert statistics.background_digest == background.digest
    assert len(statistics.gaussians.means) == 2
    for letters, expected in ((string.digits, 1.0), ("XYZ", 1.0), (string.ascii_lowercase, 0.0)):
        features = prompt_features(base, random_texts(20, letters, seed=2))
        weights = [shares(z, background, [statistics]).weights[0] for z in features]
        assert np.mean(weights) == pytest.approx(expected, abs=0.1), letters


def test_few_rows_are_refused(tiny_model: Path, place: Path) -> None:
    with pytest.raises(DataError, match=rf"1\.jsonl has {MIN_ROWS - 1} rows, expected at least {MIN_ROWS} of a form of prompts"):
        calibrate.calibrate(config(place, tiny_model, rows(), rows(MIN_ROWS - 1)))


def test_rows_that_the_adapter_hardly_changes_are_refused(tiny_model: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_statistics, "FULL_GAIN", 1e4)
    (place / "math" / STATISTICS_FILE).unlink(missing_ok=True)
    with pytest.raises(DataError, match=rf"0\.jsonl: 150 rows count as 0\.\d, expected at least {MIN_WEIGHT}: the adapter"):
        calibrate.calibrate(config(place, tiny_model, rows()))
    assert not (place / "math" / STATISTICS_FILE).exists()


def test_a_row_with_a_template_that_the_adapter_does_not_know_is_refused(tiny_model: Path, place: Path) -> None:
    form = [*rows(), *rows(1, template="chat")]
    with pytest.raises(DataError, match=r"0\.jsonl.*151.* has the template 'chat', expected one of the adapter's: plain"):
        calibrate.calibrate(config(place, tiny_model, form))


def test_another_base_s_background_is_refused(tiny_model: Path, place: Path, tmp_path: Path) -> None:
    settings = config(place, tiny_model, rows())
    assert settings.background
    background = Background.from_bytes("background", settings.background.read_bytes())
    (other := tmp_path / "other.safetensors").write_bytes(replace(background, base_digest="0" * 64).to_bytes())
    with pytest.raises(AdapterError, match=r"other\.safetensors: the base's digest is 000000000000, expected "):
        calibrate.calibrate(settings.model_copy(update={"background": other}))


def test_more_forms_than_statistics_hold_are_refused_before_the_measurement(tiny_model: Path, place: Path) -> None:
    flags = config(place, tiny_model, rows()).model_dump() | {"data": ["a.jsonl"] * 65}
    with pytest.raises(ValidationError, match="at most 64 items"):
        CalibrateConfig.model_validate(flags)


def test_the_help_says_that_an_adapter_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["calibrate", "--help"])
    with pytest.raises(SystemExit, match="0"):
        CalibrateConfig.from_arguments()
    assert capsys.readouterr().out.splitlines()[0].endswith(" ADAPTER [--FLAG VALUE ...]")


def test_a_folder_that_cannot_be_written_is_found_first(tmp_path: Path) -> None:
    settings = config(tmp_path, Path("absent"), rows())
    for adapter, fault in ((tmp_path / "no", "no'"), (Path("/proc"), "'/proc'")):
        with pytest.raises(OSError, match=fault):
            calibrate.calibrate(settings.model_copy(update={"adapter": adapter}))
