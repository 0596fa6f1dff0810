"""Sources of rows: files, data sets, and templates over their columns."""

import json
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from training.config import FitConfig
from training.data import DataError, Faults, Source, read_rows

GSM8K = {"question": "2 + 2?", "answer": "It is 4.\n#### 4"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, *rows: object) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def source(path: str, **fields: object) -> Source:
    return Source.model_validate({"path": path} | fields)


def test_templates_make_rows_of_other_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", GSM8K)
    [row] = read_rows(source(path, prompt="Question: {{ question }}\nAnswer:\n", completion=" {{ answer }}"))
    assert row.prompt == "Question: 2 + 2?\nAnswer:\n"
    assert row.completion == " It is 4.\n#### 4"
    assert row.model_extra == GSM8K


def test_a_template_reads_columns_of_any_shape_and_name(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"the question": "?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "key": "B"})
    [row] = read_rows(
        source(path, prompt="{{ row['the question'] }}", completion=" {{ choices.text[choices.label.index(key)] }}")
    )
    assert (row.prompt, row.completion) == ("?", " b")


def test_a_source_with_templates_has_no_fields_but_theirs(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"prompt": "p", "completion": 3, "messages": "none", "template": "alpaca", "chosen": "c"})
    [row] = read_rows(source(path, prompt="Ask: {{ prompt }}", completion=" {{ chosen }}"))
    assert (row.prompt, row.completion, row.template, row.chosen) == ("Ask: p", " c", None, None)


def test_pairs_can_be_made_by_templates(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"q": "p", "best": "a", "worst": "b"})
    [row] = read_rows(source(path, prompt="{{ q }}", chosen="{{ best }}", rejected="{{ worst }}"), needs="preference")
    assert (row.chosen, row.rejected) == ("a", "b")


def test_a_missing_or_null_column_is_a_missing_field(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", GSM8K, {"question": "?", "other": 1}, {"question": "?", "answer": None})
    with pytest.raises(DataError) as caught:
        read_rows(source(path, prompt="{{ question }}", completion="{{ answer }}"))
    assert "missing field: 2" in str(caught.value)
    assert "line 2: 'answer' is undefined; there are question, other" in str(caught.value)
    assert "line 3: a column that the template writes is null" in str(caught.value)


@pytest.mark.parametrize("template", ["{{ answer + 1 }}", "{{ ''.__class__.__mro__ }}", "{{ 1 / 0 }}"])
def test_a_template_that_fails_on_a_row_is_named_with_its_line(tmp_path: Path, template: str) -> None:
    path = write(tmp_path / "d.jsonl", GSM8K)
    with pytest.raises(DataError, match=r"(source template fails|missing field): 1\n +.*d.jsonl line 1: "):
        read_rows(source(path, prompt=template, completion="c"))


def test_a_row_made_by_a_template_is_checked_as_any_row(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", GSM8K | {"answer": " "})
    faults = Faults("skip")
    with pytest.raises(DataError, match="no usable row"):
        read_rows(source(path, prompt="{{ question }}", completion="{{ answer }}"), faults=faults)
    assert faults.counts == {"empty completion": 1}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "{{ question"}, "is no Jinja template"),
        ({"completion": "{{ answer }}"}, "none for the prompt"),
        ({"colour": "red"}, "Extra inputs"),
        ({"path": ""}, "at least 1 character"),
    ],
)
def test_an_unsound_source_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Source.model_validate({"path": "d.jsonl"} | fields)


def test_a_file_has_no_split(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", GSM8K)
    with pytest.raises(DataError, match="is a file, which has no name and no split"):
        read_rows(source(path, name="main", split="test"))


def test_a_data_set_is_read_by_split_and_its_rows_are_numbered(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write(folder / "train.jsonl", {"question": "a", "answer": "1"}, {"question": None, "answer": "2"})
    write(folder / "test.jsonl", {"question": "c", "answer": "3"}, {"question": "d", "answer": "4"})
    templates = {"prompt": "{{ question }}", "completion": "{{ answer }}"}
    assert [row.prompt for row in read_rows(source(str(folder), split="test[:1]", **templates))] == ["c"]
    with pytest.raises(DataError, match=rf"missing field: 1\n +{folder} row 2: a column"):
        read_rows(source(str(folder), **templates))
    with pytest.raises(DataError, match="neither a file nor a data set that can be loaded: Unknown split"):
        read_rows(source(str(folder), split="nowhere"))


def test_a_data_set_s_nulls_are_columns_that_a_row_does_not_have(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": "c", "truncated": True, "template": "plain"}]
    write(folder / "train.jsonl", *rows)
    assert [row.truncated for row in read_rows(str(folder))] == [False, True]


def test_a_data_set_that_cannot_be_loaded_is_named() -> None:
    with pytest.raises(DataError, match="'nobody/nothing' is neither a file nor a data set"):
        read_rows("nobody/nothing")
    for path in ("nothing.jsonl", "./nothing", "/nothing"):
        with pytest.raises(DataError, match="there is no file"):
            read_rows(path)


def test_a_file_needs_no_library_of_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert read_rows(write(tmp_path / "d.jsonl", {"prompt": "p", "completion": "c"}))
    with pytest.raises(DataError, match=r"'nobody/nothing' is no file, and data sets need: pip install '\.\[train\]'"):
        read_rows("nobody/nothing")


def test_the_record_of_a_run_has_a_source_as_it_was_given() -> None:
    sources = ["d.jsonl", {"path": "openai/gsm8k", "name": "main", "prompt": "{{ question }}"}]
    config = FitConfig.model_validate({"data": sources, "output": "x"})
    assert config.model_dump(mode="json")["data"] == sources
    assert json.loads(config.model_dump_json())["data"] == sources


def test_flags_take_sources_as_paths_and_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"path": "openai/gsm8k", "prompt": 'Say "{{ question }}", [then]:\nAnswer \\n:', "completion": "{{ answer }}"}
    flags = [
        "--data",
        "d.jsonl",
        "--data",
        json.dumps(fields),
        "--mix",
        "a b.jsonl",
        "--mix",
        "back\\slash.jsonl",
        "--output",
        "x",
    ]
    monkeypatch.setattr("sys.argv", ["fit", *flags])
    config = FitConfig.from_arguments()
    assert config.data == [Source(path="d.jsonl"), Source.model_validate(fields)]
    assert [source.path for source in config.mix] == ["a b.jsonl", "back\\slash.jsonl"]


@pytest.mark.parametrize("value", ['{"path": "x"', '{"path": "x", "colour": "red"}', '{"name": "x"}'])
def test_a_source_of_invalid_json_is_reported_in_one_line(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fit", "--data", value, "--output", "x"])
    with pytest.raises(SystemExit) as caught:
        FitConfig.from_arguments()
    assert caught.value.code == 2
    assert "data" in capsys.readouterr().err.splitlines()[-1]
