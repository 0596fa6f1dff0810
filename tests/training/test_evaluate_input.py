"""Rows, sources and flags of `training.evaluate`: each fault is named before anything is measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.evaluations import RED_ROWS, Rows, config, figures_of, write
from training.data import DataError
from training.evaluate import evaluate, main
from training.evaluation.config import EvaluateConfig
from training.evaluation.metrics import MetricName, read_metric_rows


def test_every_incomplete_line_is_named_before_any_request(tmp_path: Path) -> None:
    rows: Rows = [
        {"prompt": "p", "completion": "c"},
        {"prompt": "p", "task": "t", "choices": ["a"], "label": 0},
        {"prompt": "p", "task": "t", "choices": ["a"], "label": 1},
        {"prompt": "p", "task": "t", "choices": [], "label": 0},
    ]
    asks_nobody = config("choice", write(tmp_path / "rows.jsonl", rows), url="http://127.0.0.1:9")
    with pytest.raises(
        DataError, match=r"(?s)bad rows in the data: 3.*line 1: task: .* choices: .* label: .* line 3: 'label' is 1.* line 4: "
    ):
        figures_of(asks_nobody)


@pytest.mark.parametrize("metric", ["choice", "number", "refusal", "pass"])
def test_a_row_of_the_wrong_shape_is_answered_with_one_of_the_right_one(tmp_path: Path, metric: MetricName) -> None:
    with pytest.raises(DataError, match="A row looks like ") as caught:
        read_metric_rows(str(write(tmp_path / "rows.jsonl", [{"prompt": "p"}, {"prompt": "q"}])), metric)
    [example] = [line for line in str(caught.value).splitlines() if line.startswith("A row")]
    assert read_metric_rows(str(write(tmp_path / "rows.jsonl", [json.loads(example.removeprefix("A row looks like "))])), metric)


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ("--metric loss --model m", "--model needs --local"),
        ("--metric loss --local --url http://x", "--url is for a server, which --local does not ask"),
        ("--metric loss --pass-at 2", "--pass-at is for --metric pass; --pass-at is 2, expected at most --num-answers, 1"),
        ("--metric loss --max-tokens 9", "--max-tokens is for metrics of answers: exact, number, refusal, pass"),
        ("--metric pass", "--metric pass runs programs that the model writes: allow it with --execute-code"),
        ("--metric pass --execute-code --num-answers 2", "--num-answers above 1 needs a --temperature above 0"),
        ("--metric pass --execute-code --form messages", "--form messages is not for pass"),
        ("--metric loss --weights auto", "--weights has 1 weights for 0 adapters"),
        ("--metric loss --adapter a --weights 1 --weights 2", "--weights has 2 weights for 1 adapters"),
        (
            "--metric loss --adapter auto --adapter a",
            "--adapter auto lets the server select adapters and weights, expected no other",
        ),
        (
            "--metric loss --adapter auto --weights auto",
            "--adapter auto lets the server select adapters and weights, expected no",
        ),
        (
            "--metric loss --adapter a --weights auto --local",
            "--local is for adapters and weights that are the same for all prompts",
        ),
        ("--metric loss --adapter a --weights auto --record a", "--record is for adapters and weights that are the same for all"),
        ("--metric loss --adapter a --adapter b --weights auto --merge ties", "--merge ties is for given weights, found auto"),
        ("--metric loss --adapter ref --record adapters/my", "--record adapters/my takes figures of my, and --adapter names ref"),
        ("--metric loss --local --adapters nowhere --adapter a", "--adapters nowhere is no folder"),
        ("--metric loss --merge ties", "--merge ties needs --adapter"),
        ("--metric loss --adapter a --density 0.5", "--density is for a --merge that is no sum"),
        ("--metric loss --adapter a --merge ties --merge-seed 1", "--merge-seed is for --merge dare_linear and dare_ties"),
        ("--metric loss --adapter ..", "--adapter .. is no name"),
        ("--metric loss --adapter adapters/my", "--adapter adapters/my is no name: a folder is measured with --local"),
        ("--metric speed", "--metric: "),
        ("--metric loss --url 127.0.0.1:9", "--url: "),
        ("--metric loss --url http://127.0.0.1:99999", "--url: "),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    flags: str, fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", "--data", "d", *flags.split()])
    with pytest.raises(SystemExit, match="2"):
        EvaluateConfig.from_arguments()
    message = capsys.readouterr().err
    assert fault in message
    assert message.count("\n") == 1


@pytest.mark.slow
def test_the_program_prints_figures_with_their_errors(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "rows.jsonl", RED_ROWS)
    flags = ["--data", str(data), "--metric", "loss", "--local"]
    command = [sys.executable, "-m", "training.evaluate", *flags, "--model", str(tiny_model)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *lines, loss, rows = done.stdout.splitlines()
    expected = {"measured": "base", "on": tiny_model.name, "data": str(data), "template": "plain"}
    assert dict(line.split(maxsplit=1) for line in lines) == expected
    assert loss.startswith("loss ")
    assert " ± " in loss
    assert rows.split() == ["rows", "4"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *flags, "--model", str(tmp_path)])
    assert main() == 1
    assert capsys.readouterr().err.startswith("error: cannot load the base model")


def test_data_may_be_a_source_with_templates(tiny_model: Path, tmp_path: Path) -> None:
    fields = {"local": True, "model": str(tiny_model), "dtype": "float32"}
    columns = write(tmp_path / "columns.jsonl", [{"question": row["prompt"], "right": row["completion"]} for row in RED_ROWS])
    source = {"path": str(columns), "prompt": "{{ question }}", "completion": "{{ right }}"}
    result = evaluate(EvaluateConfig.model_validate({"data": json.dumps(source), "metric": "loss", **fields}))
    assert result.figures == figures_of(config("loss", write(tmp_path / "rows.jsonl", RED_ROWS), **fields))
    assert result.config.data_name == str(columns)
    hub = {"path": "openai/gsm8k", "name": "main", "split": "test"}
    assert config("loss", Path(json.dumps(hub))).data_name == "openai/gsm8k main test"


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        ('{"pth": "x"}', "--data: path: Field required; pth: Extra inputs are not permitted"),
        ('{"path": "x"', "--data: Invalid JSON: "),
        ('{"path": "x", "prompt": "{{"}', "--data: prompt: is no Jinja template"),
    ],
)
def test_an_invalid_source_is_refused(
    data: str, fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", "--data", data, "--metric", "loss"])
    with pytest.raises(SystemExit, match="2"):
        EvaluateConfig.from_arguments()
    message = capsys.readouterr().err
    assert fault in message
    assert message.count("\n") == 1
