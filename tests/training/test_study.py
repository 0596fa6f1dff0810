"""`training.study` on a tiny model: every claim is trained, measured and saved once."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from lori.base_model import load_base_model
from lori.errors import LoriError
from lori.format import load_adapter
from training.data import Source
from training.study.__main__ import _open, study
from training.study.claims import MERGED, Result, merges
from training.study.config import TASKS, StudyConfig, TaskConfig
from training.study.lab import Lab
from training.study.page import title, write_page
from training.study.scores import format_scores, gains_kept, scores_of

WORDS = ["red", "blue", "green"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study-data")
    rows = {
        "intent": [{"prompt": f"Say {word} {i}:", "completion": f" {word}"} for i in range(4) for word in WORDS],
        "math": [{"prompt": f"{i} and 1 is", "completion": f" {i + 1}"} for i in range(9)],
        "safety": [{"prompt": f"Do harm {i}", "completion": "Sorry, I can't.", "harmful": True} for i in range(6)]
        + [{"prompt": f"Do good {i}", "harmful": False} for i in range(6)],
    }
    for task, task_rows in rows.items():
        (folder / task).mkdir()
        for name in ("train", "test"):
            (folder / task / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in task_rows))
    return folder


def config_for(tiny_model: Path, data: Path, output: Path, **changes: object) -> StudyConfig:
    fields = {
        "data": data, "output": output, "model": str(tiny_model), "dtype": "float32", "seeds": [0, 1], "steps": 3, "rank": 4,
        "batch_tokens": 40, "num_rows": 6, "num_merge_rows": 4, "num_mixed": 3, "threads": 1, "weights": [1.0],
        "swept": ["intent"], "tasks": {name: TASKS[name] for name in ("intent", "math", "safety")},
    }  # fmt: skip
    return StudyConfig.model_validate(fields | changes)


@pytest.mark.slow
def test_every_claim_is_written_down(tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(tiny_model, data, tmp_path / "study", merges=["intent+math"])
    results = study(config)
    page = write_page(config, results).read_text()
    for claim in config.claims:
        assert f"![{claim}]({claim}.png)" in page
        assert (config.output / f"{claim}.png").stat().st_size > 10_000
        assert len(results[claim]) == 2
    single = {(result.what, result.task) for result in results["single"][0]}
    assert single == {
        (what, task)
        for what in ("base", "LoRA", "LoRI-D", "LoRI-S", "LoRI-S, mask within the budget")
        for task in ("intent", "math", "safety")
    }
    merged = {(result.what, result.setting) for result in results["merges"][0] if result.setting.startswith("intent+math,")}
    assert merged == {
        *((what, f"intent+math, linear, {weight}") for what in MERGED for weight in ("0.50", "1.00")),
        *(
            ("LoRI, shared basis", f"intent+math, {method}, {weight}")
            for method in ("ties", "dare_linear", "dare_ties", "magnitude")
            for weight in ("0.50", "1.00")
        ),
    }
    assert [result.setting for result in results["sparsity"][0]] == ["0", "0.5", "0.8", "0.9", "0.95", "0.99"]
    mixes = {
        "intent-lori-s": [],
        "safety-lora": ["safety-unanswered"],
        "intent-lori-others": ["math-3", "safety-3"],
        "intent-lori-instructed": ["safety-unanswered"],
    }
    for name, mixed in mixes.items():
        adapter = json.loads((config.output / "seed-0" / "adapters" / name / "adapter_config.json").read_text())
        assert [Path(source).stem for source in adapter["lori"]["training"]["mix"]] == mixed
    # Existing results are not computed again.
    monkeypatch.setattr("training.study.lab.fit", None)
    monkeypatch.setattr("training.study.lab.measure", None)
    assert study(config) == results
    # The saved results of a claim suffice, without its adapters and measurements.
    moved = config.model_copy(update={"output": tmp_path / "moved"})
    for seed in ("seed-0", "seed-1"):
        (moved.output / seed).mkdir(parents=True)
        for claim in config.claims:
            shutil.copy(config.output / seed / f"{claim}.json", moved.output / seed)
    assert study(moved) == results
    # But results with other options are not used: the study would train again.
    for name, changes in {"weights": {"weights": [0.3]}, "steps": {"steps": 4}, "rank": {"rank": 5}}.items():
        changed = config.model_copy(update={"output": tmp_path / name, **changes})
        shutil.copytree(moved.output, changed.output, ignore=shutil.ignore_patterns("options.json"))
        with pytest.raises(TypeError, match="'NoneType' object is not callable"):
            study(changed)


@pytest.mark.slow
def test_without_ordinary_instructions_none_are_mixed_in(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    tasks = {name: TASKS[name] for name in ("intent", "math")}
    [results] = study(config_for(tiny_model, data, tmp_path / "study", claims=["merges"], seeds=[0], tasks=tasks))["merges"]
    assert {result.what for result in results} == {"base", *MERGED} - {"LoRI, shared, instructions mixed in"}


@pytest.mark.slow
def test_a_task_without_unanswered_prompts_has_no_instructions_to_mix_in(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """Regression: the file of the base's answers was empty, and training refused it."""
    rows = [json.loads(line) for line in (data / "safety" / "train.jsonl").read_text().splitlines()]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"completion": " Sure.", **row}) + "\n" for row in rows))
    tasks = {"safety": TASKS["safety"].model_copy(update={"train": [Source(path=str(tmp_path / "all.jsonl"))]})}
    [results] = study(config_for(tiny_model, data, tmp_path / "study", claims=["merges"], seeds=[0], tasks=tasks))["merges"]
    assert "LoRI, shared, instructions mixed in" not in {result.what for result in results}
    adapter = json.loads((tmp_path / "study" / "seed-0" / "adapters" / "safety-lori-s" / "adapter_config.json").read_text())
    assert adapter["lori"]["training"]["mix"] == []


def test_one_seed_has_no_mean_and_no_spread(
    tiny_model: Path, data: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    assert title(3).startswith("Mean ± spread")
    config = config_for(tiny_model, data, tmp_path / "study", claims=["single", "sparsity"], seeds=[4])
    kinds = {"single": ("LoRI-S", ""), "sparsity": ("LoRI-S", "0.5")}
    results = {claim: [[Result(*kind, "intent", {"exact_match": 0.5})]] for claim, kind in kinds.items()}
    config.output.mkdir()
    page = write_page(config, results).read_text()  # type: ignore[arg-type]  # claims
    assert page.startswith("# Figures of one seed, without a spread\n\nSeed 4; ")
    assert "±" not in page
    assert "Mean" not in page
    assert (config.output / "sparsity.png").is_file()
    assert not recwarn.list


def test_the_helps_example_of_tasks_is_valid(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    text = StudyConfig.model_fields["tasks"].description or ""
    tasks = yaml.safe_load(text[text.index("`") :].strip("`."))["tasks"]
    changes = {"tasks": tasks, "claims": ["single"]}
    assert config_for(tiny_model, data, tmp_path, **changes).tasks["sums"].is_loss


@pytest.mark.slow
def test_a_disjoint_mask_keeps_safety_as_it_was(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    config = config_for(tiny_model, data, tmp_path / "study", claims=["continual"], seeds=[0])
    [results] = study(config)["continual"]
    assert [(result.what, result.task) for result in results] == [
        (what, task)
        for name in ("LoRA", "LoRI-D", "LoRI-S")
        for what, task in [(f"{name} before", "safety"), (name, "safety"), (name, "intent")]
    ] + [("LoRI-S, disjoint mask", "safety"), ("LoRI-S, disjoint mask", "intent")]
    folder = config.output / "seed-0" / "adapters"
    before, after = (load_adapter(folder / name).modules for name in ("safety-lori-s", "safety-then-intent-disjoint"))
    for name, b in before.items():
        assert torch.equal(after[name].dense()[b.mask], b.dense()[b.mask])
    assert sum(b.values.numel() for b in after.values()) == 2 * sum(b.values.numel() for b in before.values())


def test_an_output_belongs_to_one_set_of_options(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    _open(config_for(tiny_model, data, tmp_path / "study"))
    _open(config_for(tiny_model, data, tmp_path / "study", seeds=[5], claims=["single"]))
    with pytest.raises(LoriError, match="is of a study with other options"):
        _open(config_for(tiny_model, data, tmp_path / "study", steps=9))


def test_missing_tasks_are_refused(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    for flag, changes in (("--swept", {"swept": ["code"]}), ("--merges", {"merges": ["math+code"]})):
        with pytest.raises(ValueError, match=f"{flag}: there is no task code: known are intent, math, safety"):
            config_for(tiny_model, data, tmp_path, **changes)
    assert config_for(tiny_model, data, tmp_path, swept=["code"], claims=["single"]).swept == ["code"]
    with pytest.raises(ValueError, match="not point to a directory"):
        config_for(tiny_model, data / "nowhere", tmp_path)
    sets = config_for(tiny_model, data, tmp_path).merged_tasks
    assert sets == [("intent", "math"), ("intent", "safety"), ("math", "safety"), ("intent", "math", "safety")]


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("--seeds names one twice", {"seeds": [1, 1]}),
        ("--swept names one twice", {"swept": ["intent", "intent"]}),
        ("--merges names one twice", {"merges": ["math+safety", "safety+math"]}),
        ("--weights names one twice", {"weights": [0.501, 0.5]}),
        (r"--merges has math\+math, expected two tasks or more, each once", {"merges": ["math+math"]}),
        ("--merges has math, expected two tasks or more", {"merges": ["math"]}),
        ("'My Task' is a part of adapters' names", {"tasks": {"My Task": TASKS["math"]}}),
        ("pass runs programs", {"tasks": {"code": {"train": ["c"], "test": "c", "metric": "pass", "figure": "pass@1"}}}),
        ("less than or equal to", {"rank": 10**6}),
    ],
)
def test_ambiguous_or_impossible_tasks_are_refused_at_once(
    tiny_model: Path, data: Path, tmp_path: Path, message: str, changes: dict[str, object]
) -> None:
    with pytest.raises(ValueError, match=message):
        config_for(tiny_model, data, tmp_path, **changes)


def test_a_weight_that_is_nearly_one_over_n_is_one_over_n(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: two rows had the same name, and no page was written."""
    base = load_base_model(str(tiny_model), torch.float32)
    weights: set[float] = set()
    monkeypatch.setattr(Lab, "adapter", lambda self, name, *_, **__: self.folder / "adapters" / name)
    monkeypatch.setattr(Lab, "figures", lambda *arguments, **_: weights.update(arguments[4] if len(arguments) > 4 else ()) or {})
    lab = Lab(config_for(tiny_model, data, tmp_path, weights=[0.33, 1.0], merges=["intent+math+safety"]), base, 0)
    settings = [(result.what, result.setting, result.task) for result in merges(lab)]
    assert len(set(settings)) == len(settings)
    assert weights == {1 / 3, 1.0}


def test_scores_are_means_with_their_spread_and_gains_are_shares() -> None:
    tasks = {"a": TaskConfig(train=[], test="t", metric="loss", figure="loss", is_loss=True)}
    seeds = [
        [Result(what, setting, "a", {"loss": loss}) for what, setting, loss in rows]
        for rows in (
            [("base", "alone", 4.0), ("x", "alone", 2.0), ("x", "a+b, ties, 1.00", 3.0)],
            [("base", "alone", 4.0), ("x", "alone", 1.0), ("x", "a+b, ties, 1.00", 1.0)],
        )
    ]
    scores = scores_of(seeds, tasks)
    assert scores["x", "alone", "a: loss"] == [2.0, 1.0]
    assert format_scores(scores["x", "alone", "a: loss"]) == "1.500 ± 0.707"
    assert gains_kept(scores, tasks) == {("x", "a+b, ties, 1.00", "a"): [0.5, 1.0]}
    scores["x", "alone", "a: loss"][1] = 3.99  # a share of a gain of 0.01 would be noise
    assert gains_kept(scores, tasks) == {}
