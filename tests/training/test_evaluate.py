"""`training.evaluate` sees through the server what the model itself says."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lori.base_model import load_base_model
from lori.config import AdapterConfig
from lori.format import read_config
from lori.template import encode
from tests.server.live import Live, start
from training.config import FitConfig
from training.data import DataError
from training.evaluate import EvaluateConfig, evaluate, record, summarize
from training.fit import fit


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter that says "red"."""
    place = tmp_path_factory.mktemp("adapters")
    data = place / "red.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Say {i}:", "completion": " red"}) + "\n" for i in range(9)))
    fields = {"steps": 60, "rank": 16, "sparsity": 0.5, "batch_tokens": 60, "dtype": "float32", "template": ["plain"]}
    return fit(FitConfig.model_validate(fields | {"data": [str(data)], "model": str(tiny_model), "output": place / "red"}), "cmd")


@pytest.fixture(scope="module")
def server(tiny_model: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    flags = ["--model", str(tiny_model), "--adapters", str(adapter.parent), "--dtype", "float32"]
    with start(tmp_path_factory.mktemp("live") / "log", *flags) as live:
        yield live


def measure(server: Live, tmp_path: Path, rows: list[dict[str, object]], **fields: object) -> dict[str, float]:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return asyncio.run(evaluate(EvaluateConfig.model_validate({"data": str(data), "url": server.url} | fields)))


def test_a_loss_is_the_model_s_own(server: Live, tiny_model: Path, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": "Say é:", "completion": " blue"}, {"prompt": "x", "completion": " or not"}]
    found = measure(server, tmp_path, rows, metric="loss")
    base = load_base_model(str(tiny_model), torch.float32)
    values: list[float] = []
    for row in rows:
        prompt, completion = (encode(base.tokenizer, str(row[key])).ids for key in ("prompt", "completion"))
        scores = base.model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        values += [-scores[len(prompt) + i - 1, token].item() for i, token in enumerate(completion)]
    assert found["loss"] == pytest.approx(sum(values) / len(values), abs=1e-4)
    assert found["rows"] == 2


def test_an_adapter_is_told_from_the_base(server: Live, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": f"Say {i}:", "completion": " red"} for i in range(5)]
    assert measure(server, tmp_path, rows, metric="exact", adapter=["red"])["exact_match"] == 1.0
    assert measure(server, tmp_path, rows, metric="exact")["exact_match"] == 0.0
    assert measure(server, tmp_path, rows, metric="exact", adapter=["red"], weights=[0.0])["exact_match"] == 0.0
    assert measure(server, tmp_path, rows, metric="exact", adapter=["red"], form="messages")["exact_match"] == 1.0


def test_a_choice_is_the_likeliest(server: Live, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"task": task, "prompt": "Say 3:", "completion": " red", "choices": [" blue", " red"], "label": label}
        for task, label in [("right", 1), ("right", 1), ("wrong", 0)]
    ]
    found = measure(server, tmp_path, rows, metric="choice", adapter=["red"])
    assert found["accuracy/right"] == 1.0
    assert found["accuracy/wrong"] == 0.0
    assert found["accuracy"] == 0.5  # a mean over tasks, not over rows


def test_what_a_metric_needs_is_said(server: Live, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no 'choices'"):
        measure(server, tmp_path, [{"prompt": "p", "completion": "c"}], metric="choice")
    with pytest.raises(DataError, match=r"404.*'nobody'"):
        measure(server, tmp_path, [{"prompt": "p", "completion": "c"}], metric="loss", adapter=["nobody"])


def test_figures_are_summed_up_by_kind() -> None:
    rows = [{"refused/harmful": 1.0}, {"refused/harmful": 0.0}, {"refused/benign": 0.0}]
    assert summarize(rows) == {"refused/harmful": 0.5, "refused/benign": 0.0, "rows": 3}


def test_a_result_goes_into_config_and_card(adapter: Path) -> None:
    before = read_config(adapter)
    asked = {"data": "d", "metric": "exact"}
    record(adapter, EvaluateConfig.model_validate(asked), {"exact_match": 0.25, "rows": 4})
    merge = EvaluateConfig.model_validate(asked | {"adapter": ["red", "blue"], "weights": [1.0, 0.5]})
    record(adapter, merge, {"exact_match": 0.75, "rows": 4})
    after: AdapterConfig = read_config(adapter)
    assert after.lori.metrics == {"base: exact_match": 0.25, "1 red + 0.5 blue: exact_match": 0.75}
    assert after.lori.merge_weights == {"blue": (1.0, 0.5)}
    assert after.lori.content_digest == before.lori.content_digest
    card = (adapter / "README.md").read_text()
    assert "| 1 red + 0.5 blue | exact_match | 0.750 |" in card
    assert "cmd" in card
