"""`training.background`: the background of a base, from ordinary prompts."""

import json
import string
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from lori.base_model import load_base_model
from lori.gaussians import log_likelihoods
from lori.prompt_statistics import load_background
from tests.training.runs import random_texts
from training.background import MIN_PROMPTS, MIN_ROWS, BackgroundConfig, measure_background
from training.data import DataError
from training.prompt_features import prompt_features


def config(place: Path, model: Path, *kinds: Sequence[str]) -> BackgroundConfig:
    """Return the config of a background of these kinds of prompts, whose files are written to `place`."""
    files = [place / f"{index}.jsonl" for index in range(len(kinds))]
    for file, kind in zip(files, kinds, strict=True):
        file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in kind))
    return BackgroundConfig.model_validate(
        {
            "data": list(map(str, files)),
            "output": place / "background.safetensors",
            "model": str(model),
            "dtype": "float32",
            "num_rows": 400,
        }
    )


def test_the_background_has_a_gaussian_for_each_kind(tiny_model: Path, tmp_path: Path) -> None:
    kinds = [random_texts(MIN_PROMPTS // 2), random_texts(MIN_PROMPTS // 2 + 50, string.digits)]
    settings = config(tmp_path, tiny_model, *kinds)
    assert measure_background(settings).startswith(f"wrote {settings.output}: {MIN_PROMPTS + 16} prompts of 2 kinds, ")
    base = load_base_model(str(tiny_model), torch.float32, "eager")
    background = load_background(base.identity, settings.output)
    assert len(background.gaussians.means) == 2
    for index, kind in enumerate(kinds):
        whitened = background.whiten(prompt_features(base, kind[:20]))
        assert np.mean([np.argmax(log_likelihoods(background.gaussians.components, z)) == index for z in whitened]) > 0.9


def test_a_file_that_cannot_be_written_is_found_first(tmp_path: Path) -> None:
    settings = config(tmp_path, Path("absent"), random_texts(9))
    for output, fault in ((Path("/proc/background"), "'/proc'"), (tmp_path, "Is a directory"), (tmp_path / "no" / "x", "no'")):
        with pytest.raises(OSError, match=fault):
            measure_background(settings.model_copy(update={"output": output}))


def test_few_prompts_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"there are 400 prompts, at most 400 of a source, expected {MIN_PROMPTS} in all"):
        measure_background(config(tmp_path, tiny_model, random_texts(500)))
    with pytest.raises(DataError, match=rf"1\.jsonl has {MIN_ROWS - 1} prompts, expected at least {MIN_ROWS} of a kind"):
        measure_background(config(tmp_path, tiny_model, random_texts(400), random_texts(MIN_ROWS - 1)))
    assert not (tmp_path / "background.safetensors").exists()


def test_a_background_is_extended(tiny_model: Path, tmp_path: Path) -> None:
    original = config(tmp_path, tiny_model, random_texts(MIN_PROMPTS // 2), random_texts(MIN_PROMPTS // 2, string.digits))
    measure_background(original)
    before = original.output.read_bytes()
    place = tmp_path / "more"
    place.mkdir()
    added = random_texts(60, string.punctuation)
    settings = config(place, tiny_model, added).model_copy(update={"extend": original.output, "log_odds": -4.0})
    expected = f"wrote {settings.output}: 60 prompts of 1 kind beside those of {original.output}, "
    assert measure_background(settings).startswith(expected)
    assert original.output.read_bytes() == before
    base = load_base_model(str(tiny_model), torch.float32, "eager")
    background = load_background(base.identity, settings.output)
    assert background.original_digest == load_background(base.identity, original.output).digest
    assert background.log_odds == -4
    again = config(place, tiny_model, added).model_copy(update={"extend": settings.output, "output": place / "again"})
    measure_background(again)
    assert load_background(base.identity, again.output).log_odds == -4
    whitened = background.whiten(prompt_features(base, added[:20]))
    assert np.mean([np.argmax(log_likelihoods(background.gaussians.components, z)) == 2 for z in whitened]) > 0.9


def test_a_background_is_not_extended_beyond_its_limit(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = config(tmp_path, tiny_model, random_texts(MIN_PROMPTS // 2), random_texts(MIN_PROMPTS // 2, string.digits))
    measure_background(original)
    monkeypatch.setattr("training.background.MAX_GAUSSIANS", 3)
    settings = config(tmp_path, tiny_model, random_texts(50), random_texts(50)).model_copy(update={"extend": original.output})
    with pytest.raises(DataError, match="there are 2 kinds, expected at most 1 beside those of "):
        measure_background(settings)


def test_prompts_that_are_too_alike_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    kinds = [random_texts(10) * 40, random_texts(10, string.digits) * 40]
    with pytest.raises(DataError, match="the covariance of the prompts' features is singular: it has rank 19, expected 96"):
        measure_background(config(tmp_path, tiny_model, *kinds))
    assert not (tmp_path / "background.safetensors").exists()
