"""`training.tune`: weights of a merge that are fitted to rows, and what is written."""

import csv
import json
import random
import sys
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from lori.base_model import BaseModel, load_base_model
from lori.errors import AdapterError, LoriError, TemplateError
from lori.named_merge import NamedMerge, weights_text
from lori.store.entry import Entry
from lori.store.store import AdapterStore
from lori.template import Message
from tests.server.rig import write_adapter
from tests.training.evaluations import Rows, config, write
from training.data import DataError
from training.evaluate import evaluate
from training.evaluation.answerer import Sampling
from training.evaluation.local_adapters import apply_adapter
from training.evaluation.local_answerer import LocalAnswerer
from training.merge_score import MergeScorer
from training.tune import TuneConfig, tune
from training.weight_descent import WeightDescent

NAMES = ("math", "safety")
NUM_ROWS = 40


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return load_base_model(str(tiny_model), torch.float32, "eager")


def prompt_for(name: str, text: str) -> str | list[Message]:
    """Return a prompt: `math` is asked by plain prompts, `safety` by messages."""
    return text if name == "math" else [Message(role="user", content=text)]


@pytest.fixture(scope="module")
def place(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two adapters, and rows that each of them answered itself: those of `safety` as messages."""
    place = tmp_path_factory.mktemp("tune")
    for seed, name in enumerate(NAMES):
        adapter = write_adapter(place / name, base, seed=seed, templates=("chat", "plain"))
        prompts = [prompt_for(name, f"{name} {i}:") for i in range(NUM_ROWS)]
        with apply_adapter(base.model, adapter):
            answers = LocalAnswerer(base.model, base.tokenizer, "plain" if name == "math" else "chat").complete(
                prompts, Sampling(6)
            )
        rows: Rows = [
            {
                "prompt": prompt if isinstance(prompt, str) else [one.model_dump() for one in prompt],
                "completion": answer,
                "truncated": True,
            }
            for prompt, [answer] in zip(prompts, answers, strict=True)
            if answer.strip()
        ]
        assert len(rows) >= 32
        write(place / f"{name}.jsonl", rows)
    return place


def settings(place: Path, output: Path, **fields: object) -> TuneConfig:
    defaults = {
        "adapter": list(NAMES),
        "adapters": place,
        "data": [str(place / f"{name}.jsonl") for name in NAMES],
        "output": output,
        "dtype": "float32",
        "num_rows": 32,
        "steps": 8,
        "batch_size": 4,
        "max_weight": 1.1,
    }
    return TuneConfig.model_validate(defaults | fields)


@pytest.fixture(scope="module")
def output(place: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a merge that was fitted."""
    output = tmp_path_factory.mktemp("merges") / "both.json"
    message = tune(settings(place, output, model=str(tiny_model), steps=40))
    merge = NamedMerge.from_bytes(output.read_bytes())
    sums = " + ".join(f"{adapter.weight:.4g} {adapter.reference}" for adapter in merge.adapters)
    assert message.startswith(f"best of 12 trials: {sums}\n")
    command = f"python -m server --model {tiny_model} --adapters {place} --merges {output.parent}"
    assert message.endswith(f"wrote {output}; to serve it as 'both': {command}")
    return output


def test_the_best_trial_is_written(output: Path) -> None:
    merge = NamedMerge.from_bytes(output.read_bytes())
    with output.with_suffix(".csv").open() as file:
        trials = list(csv.DictReader(file))
    best = max(trials, key=lambda trial: float(trial["score"]))
    assert [float(best[f"weight of {name}"]) for name in NAMES] == [adapter.weight for adapter in merge.adapters]
    assert float(best["score"]) == pytest.approx(sum(merge.scores.values()) / 2, abs=1e-3)
    assert [int(trial["step"]) for trial in trials] == [0, 0, 0, 0, 5, 10, 15, 20, 25, 30, 35, 40]
    first = [tuple(float(trial[f"weight of {name}"]) for name in NAMES) for trial in trials[:4]]
    assert first == [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (1.0, 1.0)]
    assert float(best["score"]) > max(float(trial["score"]) for trial in trials[:4])
    assert all(float(trial[f"weight of {name}"]) <= 1.1 for trial in trials for name in NAMES)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_scores_are_those_of_an_evaluation_of_held_out_rows(output: Path, place: Path, tiny_model: Path, tmp_path: Path) -> None:
    merge = NamedMerge.from_bytes(output.read_bytes())
    lines = (place / "math.jsonl").read_text().splitlines()
    held_out = random.Random(0).sample(lines, 32)[:8]  # a quarter of the rows that the seed draws
    file = write(tmp_path / "held_out.jsonl", [json.loads(line) for line in held_out])
    options = {"local": True, "model": str(tiny_model), "adapters": place, "dtype": "float32"}

    def loss(**fields: object) -> float:
        return evaluate(config("loss", file, **options, **fields)).figures["loss"]

    merged = loss(adapter=list(NAMES), weights=[adapter.weight for adapter in merge.adapters])
    gain = loss() - min(loss(adapter=[name]) for name in NAMES)
    assert merge.scores[str(place / "math.jsonl")] == pytest.approx((loss() - merged) / gain, abs=1e-3)


def test_blocks_of_layers_have_weights_of_their_own(place: Path, tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "both.json"
    message = tune(settings(place, output, model=str(tiny_model), num_blocks=2))
    merge = NamedMerge.from_bytes(output.read_bytes())
    with output.with_suffix(".csv").open() as file:
        trials = list(csv.DictReader(file))
    columns = [f"weight of {name} {block}" for name in NAMES for block in (1, 2)]
    equal = [all(trial[f"weight of {name} 1"] == trial[f"weight of {name} 2"] for name in NAMES) for trial in trials]
    assert (equal[:4], equal[-1]) == ([True] * 4, False)  # Adam's first step may have the same length in both blocks
    best = max(trials, key=lambda trial: float(trial["score"]))
    written = [one.weight * block for one in merge.adapters for block in one.block_weights or [1.0, 1.0]]
    assert [float(best[column]) for column in columns] == pytest.approx(written)
    assert float(best["score"]) == pytest.approx(sum(merge.scores.values()) / 2, abs=1e-3)
    assert message.startswith(f"best of 12 trials: {weights_text(merge.adapters[0].weights)} {merge.adapters[0].reference} + ")


def test_blocks_of_adapters_on_two_bases(place: Path, base: BaseModel, tiny_model: Path, tmp_path: Path) -> None:
    copytree(place / "math", tmp_path / "math")
    write_adapter(tmp_path / "other", base, seed=5, stream=1)
    fields = {"adapters": tmp_path, "adapter": ["math", "other"], "num_blocks": 2, "model": str(tiny_model)}
    tune(settings(place, tmp_path / "both.json", **fields, data=[str(place / "math.jsonl")]))
    merge = NamedMerge.from_bytes((tmp_path / "both.json").read_bytes())
    assert [adapter.name for adapter in merge.adapters] == ["math", "other"]
    assert all(len(adapter.block_weights) == 2 for adapter in merge.adapters)


def test_more_blocks_than_layers_are_refused(place: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"--num-blocks is 3, expected 2 at most: 'math' changes 2 layers"):
        tune(settings(place, tmp_path / "both.json", model=str(tiny_model), num_blocks=3))


def test_too_few_rows_for_two_parts_are_refused(place: Path, tiny_model: Path, tmp_path: Path) -> None:
    lines = (place / "math.jsonl").read_text().splitlines()[:16]
    file = write(tmp_path / "few.jsonl", [json.loads(line) for line in (*lines, *lines)])
    fault = r"few\.jsonl: --held-out-fraction 0.25 of 16 distinct rows is 4, expected 8 at least that are held out, and as many"
    with pytest.raises(DataError, match=fault):
        tune(settings(place, tmp_path / "both.json", model=str(tiny_model), data=[str(file)]))


def test_a_row_in_two_sources_counts_in_the_first(place: Path, tiny_model: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (place / "math.jsonl").read_text().splitlines()]
    file = write(tmp_path / "again.jsonl", [*lines[:12], *({"prompt": f"so {i}:", "completion": " red"} for i in range(16))])
    fields = {"model": str(tiny_model), "data": [str(place / "math.jsonl"), str(file)]}
    with pytest.raises(DataError, match=r"again\.jsonl: --held-out-fraction 0.25 of 16 distinct rows is 4"):
        tune(settings(place, tmp_path / "both.json", **fields))


def test_rows_that_are_too_long_are_refused_or_left_out(place: Path, tiny_model: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (place / "math.jsonl").read_text().splitlines()][:32]
    file = write(tmp_path / "long.jsonl", [*rows[:5], {"prompt": "so " * 600, "completion": " long"}, *rows[5:]])
    fields = {"model": str(tiny_model), "data": [str(file)], "num_rows": 33, "max_length": 512}
    with pytest.raises(DataError, match=r"too long: 1\n.*long\.jsonl line 6: \d+ tokens under 'plain', the limit is 512"):
        tune(settings(place, tmp_path / "both.json", **fields))
    tune(settings(place, tmp_path / "both.json", on_bad="skip", **fields))
    assert NamedMerge.from_bytes((tmp_path / "both.json").read_bytes()).about.endswith("scored on 8 rows")


def test_rows_are_descended_on_or_held_out(
    place: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    descended, scored = dict[str, set[str]](), dict[str, set[str]]()

    class Descent(WeightDescent):
        def __init__(self, base: BaseModel, adapters: Any, examples: Any, *others: Any) -> None:
            descended.update({source: {example.origin for example in own} for source, own in examples.items()})
            super().__init__(base, adapters, examples, *others)

    class Scorer(MergeScorer):
        def __post_init__(self) -> None:
            scored.update({source: {row.origin for row in own} for source, own in self.rows.items()})
            super().__post_init__()

    monkeypatch.setattr("training.tune.WeightDescent", Descent)
    monkeypatch.setattr("training.tune.MergeScorer", Scorer)
    tune(settings(place, tmp_path / "both.json", model=str(tiny_model)))
    assert descended.keys() == scored.keys()
    assert [(len(descended[source]), len(scored[source])) for source in scored] == [(24, 8)] * 2
    assert not any(descended[source] & scored[source] for source in scored)


@pytest.mark.parametrize("suffix", [".json", ".png", ".csv"])
def test_nothing_is_replaced(place: Path, tiny_model: Path, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"both{suffix}"
    file.write_text("mine")
    with pytest.raises(LoriError, match=rf"remove .*both\{suffix} first, or give another name"):
        tune(settings(place, tmp_path / "both.json", model=str(tiny_model)))
    assert file.read_text() == "mine"
    assert [*tmp_path.iterdir()] == [file]


def test_a_source_that_no_adapter_improves_is_refused(place: Path, base: BaseModel, tiny_model: Path, tmp_path: Path) -> None:
    prompts = [f"base {i}:" for i in range(NUM_ROWS)]
    answers = LocalAnswerer(base.model, base.tokenizer).complete(prompts, Sampling(6))
    file = write(tmp_path / "base.jsonl", [{"prompt": p, "completion": a} for p, [a] in zip(prompts, answers, strict=True)])
    with pytest.raises(DataError, match=r"base\.jsonl: no adapter alone raises the likelihood of its answers: the best gains -"):
        tune(settings(place, tmp_path / "both.json", model=str(tiny_model), data=[str(file)], on_bad="skip"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.jsonl"]


def test_one_adapter_by_two_names_is_refused(place: Path, tiny_model: Path, tmp_path: Path) -> None:
    version = Entry("math", place / "math").version
    with pytest.raises(AdapterError, match=f"--adapter names math@{version} twice, expected each adapter once"):
        tune(settings(place, tmp_path / "both.json", model=str(tiny_model), adapter=["math", f"math@{version}"]))


def test_an_alias_is_written_as_its_adapter(place: Path, tiny_model: Path, tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    for name in NAMES:
        store.publish(place / name)
    store.alias("calc", "math")
    output = tmp_path / "both.json"
    fields = {"model": str(tiny_model), "adapters": store.root}
    tune(settings(place, output, **{"adapter": ["calc", "safety"]} | fields))
    assert [adapter.name for adapter in NamedMerge.from_bytes(output.read_bytes()).adapters] == [*NAMES]
    with pytest.raises(AdapterError, match="twice, expected each adapter once"):
        tune(settings(place, tmp_path / "same.json", **{"adapter": ["calc", "math"]} | fields))


def test_a_folder_that_cannot_be_written_is_found_first(place: Path) -> None:
    with pytest.raises(OSError, match="'/proc'"):
        tune(settings(place, Path("/proc/both.json"), model="absent"))


def test_folders_are_adapters_too(place: Path, tiny_model: Path, tmp_path: Path) -> None:
    folders = [str(place / name) for name in NAMES]
    output = tmp_path / "both.json"
    message = tune(settings(place, output, model=str(tiny_model), adapters=None, adapter=folders))
    assert message.endswith(f"--adapters {place} --merges {tmp_path}")
    merge = NamedMerge.from_bytes(output.read_bytes())
    assert [adapter.name for adapter in merge.adapters] == [*NAMES]
    assert merge.about == "python -m training.tune, 8 steps, scored on 16 rows"


def test_adapters_in_several_folders_must_be_in_one_to_be_served(place: Path, tiny_model: Path, tmp_path: Path) -> None:
    copytree(place / "safety", tmp_path / "elsewhere" / "safety")
    folders = [str(place / "math"), str(tmp_path / "elsewhere" / "safety")]
    message = tune(settings(place, tmp_path / "both.json", model=str(tiny_model), adapters=None, adapter=folders))
    assert (
        f"to serve it as 'both', once the adapters are in one FOLDER: python -m server --model {tiny_model} --adapters FOLDER"
        in message
    )


def test_adapters_without_a_common_template_are_refused(place: Path, base: BaseModel, tiny_model: Path, tmp_path: Path) -> None:
    for name, template in (("one", "chat"), ("two", "plain")):
        write_adapter(tmp_path / name, base, seed=5, templates=(template,))
    with pytest.raises(TemplateError, match="these adapters were trained on no common template"):
        tune(settings(place, tmp_path / "both.json", model=str(tiny_model), adapters=tmp_path, adapter=["one", "two"]))


def test_a_missing_extra_is_said_first(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "training.trial_plot", raising=False)
    monkeypatch.setitem(sys.modules, "lori.compare.plots", None)
    with pytest.raises(LoriError, match=r"training\.tune needs: pip install '\.\[train\]'"):
        tune(settings(place, tmp_path / "both.json", model="absent"))


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"output": Path("both.txt")}, "expected NAME.json with a NAME that matches"),
        ({"output": Path("Both.json")}, "expected NAME.json with a NAME that matches"),
        ({"output": Path("auto.json")}, "and 'auto' is reserved: requests for it let the server choose the adapters"),
        ({"data": ["math.jsonl", "math.jsonl"]}, "--data has one path twice, expected each once"),
        ({"data": ["m" * 1025]}, "--data has a path of 1025 characters, expected 1024 at most"),
        ({"data": [f"{number}.jsonl" for number in range(65)]}, "at most 64 items"),
        ({"steps": 7}, "greater than or equal to 8"),
        ({"num_rows": 31}, "greater than or equal to 32"),
        ({"held_out_fraction": 1}, "less than 1"),
        ({"max_weight": 0.5}, "greater than or equal to 1"),
        ({"adapter": []}, "at least 1 item"),
    ],
)
def test_wrong_flags_are_refused(place: Path, tmp_path: Path, fields: dict[str, object], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        settings(place, **{"output": tmp_path / "both.json"} | fields)
