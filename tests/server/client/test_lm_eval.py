"""The unmodified LM Evaluation Harness with this server: `local-completions`, with names of adapters as models."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedModel

from lori.base_model import BaseModel
from lori.format import load_adapter
from lori.template import encode
from tests.server.live import LIMIT_S, Live
from tests.server.rig import fold, greedy

QUESTIONS = ("The sky is", "One and one", "Q: é?\nA:", "The quick brown fox", "x", "To be or not")
NUM_TOKENS = 24
STOP = "e"
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""


def write_task(folder: Path, name: str, kind: str, metric: str, docs: Sequence[Mapping[str, Any]], more: str) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    task = TASK.format(name=name, kind=kind, metric=metric, data=data) + more
    (folder / f"{name}.yaml").write_text(task, encoding="utf-8")


HARNESS = """
import json, sys
from lm_eval.__main__ import cli_evaluate
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()
"""
"""A program that runs `lm_eval` with each of several lists of arguments in turn, because its imports take seconds."""


@dataclass(frozen=True, slots=True)
class Case:
    """A run of the harness: its model and its arguments."""

    model: str
    weights: Mapping[str, float]
    batch_size: int
    arguments: Mapping[str, object]

    def flags(self, folder: Path, live: Live, tokenizer: Path) -> list[str]:
        """Return the harness's arguments for the tasks in `folder`."""
        own = {"base_url": f"{live.url}/v1/completions", "max_length": 4096, "model": self.model, "tokenizer": tokenizer}
        given = ",".join(f"{key}={value}" for key, value in (own | self.arguments).items())
        flags = ["--model", "local-completions", "--model_args", given, "--tasks", "choice,text", "--include_path", str(folder)]
        return [*flags, "--output_path", str(folder / "out"), "--log_samples", "--batch_size", str(self.batch_size)]


CASES = [
    Case("math", {"math": 1.0}, 1, {"tokenized_requests": True, "num_concurrent": 4}),
    Case("math:0.7+safety:-0.4", {"math": 0.7, "safety": -0.4}, 3, {"tokenized_requests": False}),
]


def run_harness(folder: Path, runs: Sequence[Sequence[str]]) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HARNESS, json.dumps(runs)]
    run = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, timeout=LIMIT_S, cwd=folder)
    assert run.returncode == 0, run.stderr


def read_results(folder: Path) -> tuple[dict[str, float], dict[str, list[Any]]]:
    """Return the metrics of the tasks in `folder`, and the answers for each document of each task."""
    [results] = folder.glob("out/*/results_*.json")
    metrics = {name: value for task in json.loads(results.read_text())["results"].values() for name, value in task.items()}
    answers = {}
    for name in ("choice", "text"):
        [samples] = folder.glob(f"out/*/samples_{name}_*.jsonl")
        docs = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
        answers[name] = [doc["filtered_resps"] for doc in sorted(docs, key=lambda doc: cast(int, doc["doc_id"]))]
    return metrics, answers


class Truth:
    """The reference: transformers in fp32, with the adapters folded into the weights."""

    def __init__(self, base: BaseModel, adapters: Path, weights: Mapping[str, float]) -> None:
        terms = [(load_adapter(adapters / name), weight) for name, weight in weights.items()]
        self._model: PreTrainedModel = fold(copy.deepcopy(base.model), terms)
        self._tokenizer = base.tokenizer

    def likelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """Return the log-likelihood of a continuation, and whether greedy decoding gives the same."""
        ids = encode(self._tokenizer, context + continuation).ids
        first = len(encode(self._tokenizer, context).ids)
        with torch.inference_mode():
            scores = self._model(torch.tensor([ids])).logits[0, first - 1 : -1].log_softmax(-1)
        target = torch.tensor(ids[first:])
        return scores.gather(1, target[:, None]).sum().item(), bool((scores.argmax(-1) == target).all())

    def text(self, prompt: str) -> str:
        """Return the greedy continuation."""
        text = self._tokenizer.decode(greedy(self._model, encode(self._tokenizer, prompt).ids, NUM_TOKENS))
        assert isinstance(text, str)
        return text


@dataclass(frozen=True, slots=True)
class Expected:
    """The values that transformers computes for the documents of both tasks."""

    choices: list[list[tuple[float, bool]]]
    texts: list[str]


def write_tasks(folder: Path, truth: Truth) -> Expected:
    """Write two tasks, with two wrong answers in one and one in the other. Return the expected values."""
    folder.mkdir()
    texts = [truth.text(question) for question in QUESTIONS]
    choices = [[" blue", text[:4], " é", text[:7] + "#"] for text in texts]
    expected = [[truth.likelihood(q, choice) for choice in options] for q, options in zip(QUESTIONS, choices, strict=True)]
    best = [max(range(4), key=[value for value, _ in likelihoods].__getitem__) for likelihoods in expected]
    right = [*best[:-2], *((i + 1) % 4 for i in best[-2:])]
    docs = [{"question": q, "choices": options, "answer": i} for q, options, i in zip(QUESTIONS, choices, right, strict=True)]
    write_task(folder, "choice", "multiple_choice", "acc", docs, 'doc_to_choice: "{{choices}}"\n')
    stopped = [text.partition(STOP)[0] for text in texts]
    docs = [{"question": q, "answer": text} for q, text in zip(QUESTIONS, [*stopped[:-1], "never said"], strict=True)]
    more = f'generation_kwargs: {{until: ["{STOP}"], max_gen_toks: {NUM_TOKENS}, do_sample: false}}\n'
    write_task(folder, "text", "generate_until", "exact_match", docs, more)
    return Expected(expected, stopped)


@pytest.mark.slow
def test_the_harness_measures_the_values_that_transformers_computes(
    live: Live, writer: BaseModel, writer_model: Path, adapters: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / str(number) for number, _ in enumerate(CASES)]
    truths = [write_tasks(folder, Truth(writer, adapters, case.weights)) for folder, case in zip(folders, CASES, strict=True)]
    run_harness(tmp_path, [case.flags(folder, live, writer_model) for folder, case in zip(folders, CASES, strict=True)])
    for folder, expected in zip(folders, truths, strict=True):
        metrics, answers = read_results(folder)
        for answer, likelihoods in zip(answers["choice"], expected.choices, strict=True):
            assert [float(value) for value, _ in answer] == pytest.approx([value for value, _ in likelihoods], abs=1e-3)
            assert [is_greedy == "True" for _, is_greedy in answer] == [is_greedy for _, is_greedy in likelihoods]
        assert any(is_greedy for likelihoods in expected.choices for _, is_greedy in likelihoods)
        assert [text for [text] in answers["text"]] == expected.texts
        assert metrics["acc,none"] == pytest.approx(4 / 6)
        assert metrics["exact_match,none"] == pytest.approx(5 / 6)
