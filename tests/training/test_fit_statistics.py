"""`training.fit` ends with statistics of the adapter's prompts, for automatic weights, where they can be made."""

import json
import logging
import shlex
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import training.calibrate
import training.fit
from lori.base_model import BaseModel, load_base_model
from lori.errors import AdapterError
from lori.format import load_adapter
from lori.prompt_statistics import MAX_GAUSSIANS, STATISTICS_FILE, Background, fit_background
from lori.store.entry import Entry
from lori.template import Message
from tests.training.runs import config_for, flags_for, random_texts
from training.data import DataError, Row
from training.fit import calibrate_command, fit
from training.prompt_features import prompt_features
from training.prompt_statistics import MAX_ALL_ROWS, MAX_ROWS, MIN_ROWS, Form, forms_of, measure, measure_changed

ANSWER = "yes yes yes"


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return load_base_model(str(tiny_model), torch.float32, "eager")


@pytest.fixture(scope="module")
def background(base: BaseModel) -> Background:
    return fit_background(base.identity.digest, [prompt_features(base, random_texts(300, string.ascii_lowercase))])


@pytest.fixture
def file(background: Background, tmp_path: Path) -> Path:
    """Return the background's file."""
    (tmp_path / "background.safetensors").write_bytes(background.to_bytes())
    return tmp_path / "background.safetensors"


def write_rows(file: Path, num_plain: int, num_chats: int) -> list[Row]:
    """Write rows of both forms, and return the plain ones."""
    plain = [{"prompt": text, "completion": ANSWER} for text in random_texts(num_plain, string.digits)]
    users = random_texts(num_chats, "XYZ")
    chats = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "no"}]} for text in users]
    file.write_text("".join(json.dumps(row) + "\n" for row in plain + chats))
    return [Row(prompt=row["prompt"], completion=ANSWER) for row in plain]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lori", "lora"])
def test_a_form_with_enough_rows_is_measured_as_by_calibrate(
    tiny_model: Path, base: BaseModel, background: Background, file: Path, tmp_path: Path, method: str
) -> None:
    rows = tmp_path / "sums.jsonl"
    plain = write_rows(rows, MIN_ROWS, MIN_ROWS - 1)
    changes: dict[str, object] = {"method": method, "template": ["plain", "chat"], "steps": 30, "mix": [], "background": file}
    folder = fit(config_for(tiny_model, rows, tmp_path / "sums", **changes), "command")
    adapter = load_adapter(folder, base.identity)
    statistics = Entry("sums", folder).prompt_statistics(adapter.config.lori.content_digest)
    assert statistics is not None
    assert len(statistics.gaussians.means) == 1, "there are too few messages"
    expected = measure(base, adapter, background, [Form("sums", plain)])
    np.testing.assert_allclose(statistics.gaussians.means, expected.gaussians.means, atol=1e-3)


@pytest.mark.slow
def test_rows_that_were_left_out_are_not_measured(
    tiny_model: Path, file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rows = tmp_path / "sums.jsonl"
    write_rows(rows, MIN_ROWS, 0)
    with rows.open("a") as out:
        out.write(json.dumps({"prompt": "1" * 5000, "completion": ANSWER}) + "\n")
    config = config_for(tiny_model, rows, tmp_path / "sums", steps=30, mix=[], background=file, on_bad="skip", max_length=100)
    assert (fit(config, "command") / STATISTICS_FILE).exists(), caplog.text


@pytest.mark.slow
def test_the_log_says_why_there_are_none(tiny_model: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    folder = fit(config_for(tiny_model, data, tmp_path / "colours", steps=1), "command")
    assert not (folder / STATISTICS_FILE).exists()
    few, no_background = "expected at least 80 of one form, plain prompts or messages", "has no background (--background)"
    [line] = [line for line in caplog.messages if line.startswith("no statistics for automatic weights: ")]
    assert few in line
    assert no_background in line
    caplog.clear()
    fit(config_for(tiny_model, data, tmp_path / "colours", steps=1, prompt_statistics=False), "command")
    assert "statistics" not in caplog.text


@pytest.mark.slow
def test_rows_that_the_adapter_hardly_changes_end_no_training(
    tiny_model: Path, file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rows = tmp_path / "sums.jsonl"
    write_rows(rows, MIN_ROWS, 0)
    config = config_for(tiny_model, rows, tmp_path / "sums", steps=1, lr=1e-9, mix=[], background=file)
    assert not (fit(config, "command") / STATISTICS_FILE).exists()
    few = f"no statistics for automatic weights: plain prompts of {rows}: 80 rows count as 0.0, expected at least 40"
    assert few in caplog.text


@pytest.mark.slow
def test_an_interrupted_measurement_names_the_command_that_makes_it_up(
    tiny_model: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Regression: the last line said to resume a run that had ended, and nothing about statistics."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    rows, folder = tmp_path / "sums of two.jsonl", tmp_path / "sums"
    write_rows(rows, MIN_ROWS, 0)
    templates = {"path": str(tmp_path / "copy.jsonl"), "prompt": "{{ prompt }}", "completion": "{{ completion }}"}
    (tmp_path / "copy.jsonl").write_bytes(rows.read_bytes())
    flags = flags_for(tiny_model, rows, folder, steps=30, mix=[], background=file, on_bad="skip")
    monkeypatch.setattr("sys.argv", ["fit", *flags, "--data", json.dumps(templates)])
    with monkeypatch.context() as patch:
        patch.setattr("training.fit.measure_changed", interrupt)
        assert training.fit.main() == 130
    *_, line = capsys.readouterr().err.splitlines()
    state, _, command = line.partition("; to make them: ")
    assert state == f"interrupted: {folder} is complete, without statistics for automatic weights"
    assert load_adapter(folder)
    assert not folder.with_name("sums.checkpoint").exists()
    assert not (folder / STATISTICS_FILE).exists()
    python, *start = shlex.split(command)
    assert (python, start[:3]) == ("python", ["-m", "training.calibrate", str(folder)])
    monkeypatch.setattr("sys.argv", ["calibrate", *start[2:]])
    assert training.calibrate.main() == 0
    assert (folder / STATISTICS_FILE).exists()


@pytest.mark.parametrize(("changes", "expected"), [({}, "--data {rows}"), ({"loss": "dpo"}, "--data ROWS")])
def test_the_command_of_a_measurement_has_the_data_unless_they_are_pairs(
    tiny_model: Path, tmp_path: Path, changes: dict[str, object], expected: str
) -> None:
    rows, folder = tmp_path / "a.jsonl", tmp_path / "a"
    command = calibrate_command(config_for(tiny_model, rows, folder, dtype="auto", mix=[], **changes))
    data = expected.format(rows=rows)
    assert command == f"python -m training.calibrate {folder} {data} --model {tiny_model}"


@pytest.mark.slow
def test_a_file_that_is_no_background_is_reported_before_the_training(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "b.safetensors").write_bytes(b"x")
    with pytest.raises(AdapterError, match="is not a sound background"):
        fit(config_for(tiny_model, data, tmp_path / "colours", background=tmp_path / "b.safetensors"), "command")
    assert not (tmp_path / "colours").exists()


def test_a_background_without_a_measurement_is_refused(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="--background is for --prompt-statistics"):
        config_for(tiny_model, data, tmp_path / "colours", background=tmp_path / "b", prompt_statistics=False)


def test_a_reserved_name_is_refused(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="--output ends in 'auto', which is to be the adapter's name: 'auto' is reserved"):
        config_for(tiny_model, data, tmp_path / "auto")


def rows_of(source: str, num_plain: int, num_messages: int = 0) -> list[Row]:
    prompts = [*(f"text {i}" for i in range(num_plain)), *([Message(role="user", content=f"{i}")] for i in range(num_messages))]
    return [Row(prompt=prompt, completion="a").set_origin(f"{source} line {i}", source) for i, prompt in enumerate(prompts)]


def sizes(*rows: list[Row]) -> dict[str, int]:
    return {form.source: len(form.rows) for form in forms_of([row for part in rows for row in part], 0)}


def test_each_source_has_a_form_of_its_own() -> None:
    both = rows_of("a", MAX_ROWS + 1, MIN_ROWS)
    assert sizes(both, rows_of("b", MIN_ROWS)) == {
        "plain prompts of a": MAX_ROWS,
        "messages of a": MIN_ROWS,
        "plain prompts of b": MIN_ROWS,
    }


def test_small_sources_make_one_form_together() -> None:
    few = MIN_ROWS // 2
    assert sizes(rows_of("a", few), rows_of("b", MIN_ROWS - few), rows_of("c", 0, few)) == {"plain prompts": MIN_ROWS}


def test_more_sources_than_forms_are_measured_together() -> None:
    assert sizes(*(rows_of(str(i), MIN_ROWS) for i in range(MAX_GAUSSIANS + 1))) == {"plain prompts": MAX_ROWS}


def test_many_forms_have_fewer_rows() -> None:
    num_rows = sizes(*(rows_of(str(i), MAX_ROWS) for i in range(20))).values()
    assert list(num_rows) == [MAX_ALL_ROWS // 20] * 20


def test_small_sources_are_not_counted_as_forms() -> None:
    few = [rows_of(f"few {i}", 2) for i in range(MAX_GAUSSIANS)]
    assert sizes(rows_of("big", MIN_ROWS), *few) == {"plain prompts of big": MIN_ROWS, "plain prompts": 2 * MAX_GAUSSIANS}


@pytest.mark.slow
def test_a_form_that_the_adapter_hardly_changes_is_left_out(
    tiny_model: Path, base: BaseModel, background: Background, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = write_rows(tmp_path / "sums.jsonl", MIN_ROWS, 0)
    config = config_for(tiny_model, tmp_path / "sums.jsonl", tmp_path / "sums", steps=30, mix=[], prompt_statistics=False)
    adapter = load_adapter(fit(config, "command"), base.identity)
    forms = [Form("sums", plain), Form("others", [row.model_copy(update={"completion": "zzz"}) for row in plain])]
    assert len(measure_changed(base, adapter, background, forms).gaussians.means) == 1
    assert "left out of the statistics: others: 80 rows count as" in caplog.text
    with pytest.raises(DataError, match=r"others: 80 rows count as .*, expected at least 40"):
        measure(base, adapter, background, forms)
    halves = [Form("first", plain[:30]), Form("second", plain[30:])]
    with pytest.raises(DataError, match=r"first: 30 rows count as"):
        measure(base, adapter, background, halves)
    pooled = measure_changed(base, adapter, background, [Form("first", plain[:30]), Form("second", plain[30:60])])
    assert len(pooled.gaussians.means) == 1
