"""Metrics, on a fake answerer with fixed answers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from lori.template import Template
from training.data import DataError
from training.evaluation.answerer import LogLikelihood, Prompt, Sampling
from training.evaluation.figures import Figures
from training.evaluation.metrics import METRICS, MetricName, MetricOptions, measure, read_metric_rows


class FakeAnswerer:
    """Answerer with fixed answers, one token for each character. A completion is more likely the nearer its length is to 3."""

    template: Template = "plain"

    def __init__(self, answers: Mapping[str, Sequence[str]] | None = None) -> None:
        self.answers = answers or {}
        self.calls: list[dict[str, object]] = []

    def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[str]]:
        self.calls.append(
            {"max_tokens": sampling.max_tokens, "stop": sampling.stop, "temperature": sampling.temperature, "seed": sampling.seed}
        )
        return [list(self.answers[str(prompt)][: sampling.num_answers]) for prompt in prompts]

    def log_likelihoods(self, texts: Sequence[tuple[Prompt, str]]) -> list[LogLikelihood]:
        return [LogLikelihood(-abs(len(completion) - 3.0) - 1, len(completion)) for _, completion in texts]


def figures_of(
    tmp_path: Path, name: MetricName, rows: list[dict[str, object]], answerer: FakeAnswerer, options: MetricOptions | None = None
) -> Figures:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = measure(name, answerer, read_metric_rows(str(data), name), options)
    return {key: value for key, value in figures.items() if not key.endswith("_stderr")}


def test_a_loss_is_a_mean_over_tokens_not_over_rows(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": "p", "completion": " ab"}, {"prompt": "p", "completion": " abcdef"}]
    assert figures_of(tmp_path, "loss", rows, FakeAnswerer()) == {"loss": (1 + 5) / (3 + 7), "rows": 2}


def test_a_choice_is_the_likeliest_as_a_whole_or_by_character(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"task": "whole", "prompt": "p ", "choices": ["abc", "abcd"], "label": 0},
        {"task": "by", "prompt": "p ", "choices": ["ab", "abcd"], "label": 1},
        {"task": "by", "prompt": "p ", "choices": ["ab", "abc"], "label": 0},
    ]
    assert figures_of(tmp_path, "choice", rows, FakeAnswerer()) == {
        "accuracy/whole": 1.0, "accuracy/by": 0.0, "accuracy": 0.5,
        "accuracy_by_character/whole": 1.0, "accuracy_by_character/by": 0.5, "accuracy_by_character": 0.75,
        "rows/whole": 1, "rows/by": 2, "rows": 3,
    }  # fmt: skip


def test_an_exact_answer_is_the_completion_as_training_writes_it(tmp_path: Path) -> None:
    """Regression: only the first line was read of a completion on a line of its own, and of one with several lines."""
    texts = {"Say red:": "red", "a": " 1\n\n2\n", "b": "\nred", "c ": "red", "d": " red"}
    rows: list[dict[str, object]] = [{"prompt": prompt, "completion": text} for prompt, text in texts.items()]
    expected = {"Say red:": "\nred", "a": " 1\n\n2\n", "b": "\nred", "c ": "red", "d": " red"}
    for suffix, share in {"": 1.0, "\nmore": 1.0, " more": 0.0}.items():
        answerer = FakeAnswerer({prompt: [text.rstrip() + suffix] for prompt, text in expected.items()})
        assert figures_of(tmp_path, "exact", rows, answerer) == {"exact_match": share, "rows": 5}
        assert answerer.calls[0]["stop"] == ()
    answerer = FakeAnswerer({prompt: [text.strip()] for prompt, text in expected.items()})
    assert figures_of(tmp_path, "exact", rows, answerer)["exact_match"] == 1.0, "beside the prompt is right, too"
    answerer = FakeAnswerer({prompt: ["\n" + text.strip()] for prompt, text in expected.items()})
    assert figures_of(tmp_path, "exact", rows, answerer)["exact_match"] == 0.4, "but not below it, where training does not put it"


def test_an_exact_answer_is_the_completion_to_the_end_of_its_line(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": "a", "completion": " red\n"}, {"prompt": "b", "completion": " red"}]
    answerer = FakeAnswerer({"a": ["red"], "b": [" reddish"]})
    assert figures_of(tmp_path, "exact", rows, answerer) == {"exact_match": 0.5, "rows": 2}
    assert answerer.calls == [{"max_tokens": 40, "stop": ("\n",), "temperature": 0.0, "seed": 0}]


def test_an_exact_answer_may_be_as_long_as_the_longest_completion(tmp_path: Path) -> None:
    """Regression: an answer of more than 40 tokens was cut, and counted as wrong."""
    rows: list[dict[str, object]] = [{"prompt": "a", "completion": " é" * 50}, {"prompt": "b", "completion": " red"}]
    answerer = FakeAnswerer({"a": [" é" * 50], "b": [" red"]})
    for options, longest in ((None, 150), (MetricOptions(max_tokens=9), 9)):
        figures_of(tmp_path, "exact", rows, answerer, options)
        assert answerer.calls.pop()["max_tokens"] == longest


def test_a_number_is_read_from_the_answer_alone(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": f"#### {n}?", "answer": n} for n in (4, "4", "1,000", 2.5)]
    answerer = FakeAnswerer({"#### 4?": ["It is 4.0"], "#### 1,000?": ["I do not know"], "#### 2.5?": ["2.50"]})
    assert figures_of(tmp_path, "number", rows, answerer) == {"number_match": 0.75, "rows": 4}


def test_harmful_and_benign_rows_are_counted_separately(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": p, "harmful": harmful} for p, harmful in [("a", True), ("b", True), ("a", False)]]
    answerer = FakeAnswerer({"a": ["I cannot"], "b": ["Sure"]})
    assert figures_of(tmp_path, "refusal", rows, answerer) == {
        "refused/harmful": 0.5, "refused/benign": 1.0, "rows/harmful": 2, "rows/benign": 1, "rows": 3
    }  # fmt: skip
    assert figures_of(tmp_path, "refusal", rows[:1], answerer) == {"refused/harmful": 1.0, "rows/harmful": 1, "rows": 1}


def test_a_problem_is_solved_by_one_right_answer_of_k(tmp_path: Path) -> None:
    test = "\ndef check(f):\n    assert f(1) == 2\n"
    rows: list[dict[str, object]] = [{"prompt": p, "test": test, "entry_point": "f"} for p in ("def f(x):\n", "f = lambda x:")]
    answerer = FakeAnswerer({"def f(x):\n": ["  return x + 1", "  return 3", "  retur", " exit(0)"], "f = lambda x:": ["0"] * 4})
    options = MetricOptions(max_tokens=9, num_answers=4, pass_at=(1, 3, 4), temperature=0.8, seed=5)
    figures = figures_of(tmp_path, "pass", rows, answerer, options)
    assert figures == pytest.approx({"pass@1": 0.125, "pass@3": 0.375, "pass@4": 0.5, "rows": 2})
    assert {key: value for key, value in answerer.calls[0].items() if key != "stop"} == {
        "max_tokens": 9, "temperature": 0.8, "seed": 5
    }  # fmt: skip


def test_rows_are_drawn_by_the_seed(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": str(i), "completion": "c"}) + "\n" for i in range(20)))
    first = read_metric_rows(str(data), "loss", 5, seed=1)
    assert first == read_metric_rows(str(data), "loss", 5, seed=1)
    assert first != read_metric_rows(str(data), "loss", 5, seed=2)
    assert len(read_metric_rows(str(data), "loss", 50)) == 20


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("number", {"prompt": "p"}, "line 1: answer: Field required"),
        ("number", {"prompt": "p", "answer": "many"}, "holds no number: 'many'"),
        ("refusal", {"prompt": "p"}, "harmful: Field required"),
        ("pass", {"prompt": "p", "entry_point": "f"}, "test: Field required"),
        ("pass", {"prompt": "p", "test": "t", "entry_point": "f()"}, "is no name of a function: 'f"),
        ("choice", {"prompt": "p", "task": "t", "choices": ["a", ""], "label": 0}, "choices.1: String should have at least 1"),
        ("exact", {"prompt": "p"}, "no completion: 1"),
    ],
)
def test_a_row_without_a_field_that_its_metric_needs_is_refused(
    tmp_path: Path, name: MetricName, row: dict[str, object], message: str
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError) as error:
        read_metric_rows(str(data), name)
    assert message in str(error.value)


def test_three_metrics_have_a_token_limit_of_their_own() -> None:
    assert {name for name, metric in METRICS.items() if metric.max_tokens} == {"number", "refusal", "pass"}
