"""Recipes: shipped ones, and a user's own files."""

import json
import re
import shlex
from pathlib import Path

import pytest

from training.command_line import SHIPPED_RECIPES, RecipeError, read_recipe
from training.config import LORA_LR, LORI_LR, FitConfig
from training.data import Source, read_rows

NAMES = sorted(path.stem for path in SHIPPED_RECIPES.glob("*.yaml"))
PAPER: dict[str, tuple[int, float, float, float, float]] = {
    "llama-3-8b-nlu-r32": (32, 64, 5e-5, 5e-4, 1),
    "llama-3-8b-nlu-r64": (64, 128, 5e-5, 1e-4, 1),
    "llama-3-8b-math-r32": (32, 64, 5e-5, 5e-4, 3),
    "llama-3-8b-math-r64": (64, 128, 5e-5, 1e-3, 3),
    "llama-3-8b-code-r32": (32, 64, 5e-5, 5e-4, 2),
    "llama-3-8b-code-r64": (64, 128, 1e-5, 1e-4, 2),
    "llama-3-8b-safety-r32": (32, 64, 5e-5, 5e-4, 1),
    "llama-3-8b-safety-r64": (64, 128, 1e-5, 1e-4, 1),
    "mistral-7b-nlu-r32": (32, 64, 1e-5, 1e-4, 1),
    "mistral-7b-nlu-r64": (64, 128, 1e-5, 1e-4, 1),
    "mistral-7b-math-r32": (32, 64, 5e-5, 5e-4, 3),
    "mistral-7b-math-r64": (64, 64, 1e-4, 5e-4, 3),
    "mistral-7b-code-r32": (32, 64, 5e-5, 5e-4, 2),
    "mistral-7b-code-r64": (64, 128, 1e-5, 1e-4, 2),
    "mistral-7b-safety-r32": (32, 64, 5e-5, 5e-4, 1),
    "mistral-7b-safety-r64": (64, 128, 1e-5, 1e-4, 1),
}
"""Rank, alpha, learning rates of LoRI-D and LoRI-S, and epochs in the scripts that `parts/paper.yaml` names."""
NOT_TWICE_THE_RANK, BELOW_FIVE = {"mistral-7b-math-r64"}, {"llama-3-8b-nlu-r64"}
"""Scripts that differ from the paper's rules: alpha is 2r, and LoRI-S's learning rate is 5 to 20 times LoRI-D's."""
ROWS: dict[str, dict[str, object]] = {
    "openai/gsm8k": {"question": "2 + 2?", "answer": "4\n#### 4"},
    "mteb/banking77": {"text": "My card?", "label": 1, "label_text": "Card_arrival"},
    "allenai/ai2_arc": {"id": "1", "question": "Why?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
    "allenai/openbookqa": {"question_stem": "It", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
    "google/boolq": {"question": "is it", "answer": True, "passage": "It is."},
    "fedyanin/safety_llamas": {"prompt": "Do harm.", "chosen": "I can't."},
    "yahma/alpaca-cleaned": {"instruction": "Add.", "input": "1 1", "output": "2"},
    "zwhe99/commonsense_170k": {"instruction": "Which?", "input": "", "output": "the answer is 1", "answer": "1"},
    "sahil2801/CodeAlpaca-20k": {"instruction": "Print.", "input": "", "output": "print()"},
}
"""A row with the columns of each public data set."""


def load(name: str) -> FitConfig:
    return FitConfig(recipe=name, output=Path("x"))  # type: ignore[call-arg]  # the data is the recipe's


def from_flags(monkeypatch: pytest.MonkeyPatch, *flags: str) -> FitConfig:
    monkeypatch.setattr("sys.argv", ["fit", *flags, "--output", "x"])
    return FitConfig.from_arguments()


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_recipe_loads_and_its_templates_fit_its_data(name: str, tmp_path: Path) -> None:
    config = load(name)
    assert config.recipe == name
    for source in config.data:
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(ROWS[source.path]))
        [row] = read_rows(Source.model_validate({"path": str(path)} | source.templates))
        assert row.completion
        assert row.completion[0].isspace()


def test_the_paper_s_runs_are_shipped() -> None:
    assert {*PAPER, "small-math", "small-intent", "small-nlu", "small-safety"} == {*NAMES}
    for name, figures in PAPER.items():
        config = load(name)
        assert (config.rank, config.alpha, config.calibration_lr, config.lr, config.epochs) == figures, name
        assert (config.method, config.batch_size, config.sparsity, config.granularity) == ("lori", 32, 0.9, "model")
        assert (config.steps, config.calibration_steps, config.calibration_epochs) == (0, 0, 0)  # LoRI-D is as long as LoRI-S
        assert name.endswith(f"-r{config.rank}")
        assert name.startswith(
            {"meta-llama/Meta-Llama-3-8B": "llama-3-8b-", "mistralai/Mistral-7B-v0.1": "mistral-7b-"}[config.model]
        )


def test_the_differences_of_the_papers_runs_from_its_rule_are_documented() -> None:
    ratios = {name: round(lori_s / lori_d, 6) for name, (_, _, lori_d, lori_s, _) in PAPER.items()}
    assert {name for name, (rank, alpha, *_) in PAPER.items() if alpha != 2 * rank} == NOT_TWICE_THE_RANK
    assert {name for name, ratio in ratios.items() if not 5 <= ratio <= 20} == BELOW_FIVE
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in NOT_TWICE_THE_RANK | BELOW_FIVE)


def test_flags_win_over_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    config = from_flags(monkeypatch, "--recipe", "llama-3-8b-math-r32", "--lr", "0.5", "--data", "mine.jsonl")
    assert (config.lr, config.data) == (0.5, [Source(path="mine.jsonl")])
    assert (config.calibration_lr, config.alpha, config.model) == (5e-5, 64, "meta-llama/Meta-Llama-3-8B")


def test_a_card_omits_data_that_is_not_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "BANKING77" in load("small-intent").about
    assert from_flags(monkeypatch, "--recipe", "small-intent", "--data", "mine.jsonl").about == ""
    assert from_flags(monkeypatch, "--recipe", "small-intent", "--data", "mine.jsonl", "--about", "Mine.").about == "Mine."
    assert "BANKING77" in from_flags(monkeypatch, "--recipe", "small-intent", "--steps", "3").about


def test_epochs_on_the_command_line_win_over_a_recipe_s_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    config = from_flags(monkeypatch, "--recipe", "small-math", "--epochs", "2", "--calibration-epochs", "0.5")
    assert (config.steps, config.epochs, config.calibration_steps, config.calibration_epochs) == (0, 2, 0, 0.5)
    assert from_flags(monkeypatch, "--recipe", "small-math").steps == 150


def test_tokens_on_the_command_line_win_over_a_recipe_s_batch_of_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    config = from_flags(monkeypatch, "--recipe", "llama-3-8b-nlu-r32", "--batch-tokens", "4096")
    assert (config.batch_size, config.batch_tokens) == (0, 4096)
    assert from_flags(monkeypatch, "--recipe", "llama-3-8b-nlu-r32").batch_size == 32


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("small-math --steps 100 --epochs 5", "--epochs is for --steps 0"),
        ("small-math --method lori-d --lr 0.01", "--lr is for LoRI-S or LoRA"),
        ("small-math --batch-size 8 --batch-tokens 4096", "--batch-tokens is for --batch-size 0"),
        ("llama-3-8b-math-r32 --method lora --calibration-lr 0.5", "--calibration-lr is for a LoRI-D"),
    ],
)
def test_a_flag_that_does_nothing_is_refused_beside_a_recipe_too(
    flags: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        from_flags(monkeypatch, "--recipe", *flags.split())
    assert message in capsys.readouterr().err


def test_commands_with_commas_and_quotes_are_written_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = ['cut -d, -f1 a > "b, c"', "sort b"]
    assert from_flags(monkeypatch, "--data", "d.jsonl", "--prepare", json.dumps(commands)).prepare == commands


def test_a_recipe_s_rate_is_that_of_its_own_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: LoRA was trained at the recipe's learning rate for LoRI-S, at which it diverges."""
    (tmp_path / "r.yaml").write_text("method: lora\nlr: 0.004\n")
    rates = {
        method: [from_flags(monkeypatch, "--recipe", recipe, "--data", "d.jsonl", *flags).peak_lr for recipe in recipes]
        for method, flags in {"": (), "lora": ("--method", "lora"), "lori": ("--method", "lori")}.items()
        for recipes in [("llama-3-8b-math-r32", str(tmp_path / "r.yaml"))]
    }
    recipe_rate = load("llama-3-8b-math-r32").peak_lr
    assert recipe_rate not in (LORI_LR, LORA_LR)
    assert rates == {"": [recipe_rate, 0.004], "lora": [LORA_LR, 0.004], "lori": [recipe_rate, LORI_LR]}
    assert from_flags(monkeypatch, "--recipe", "small-math", "--method", "lora", "--lr", "0.5").peak_lr == 0.5


def test_a_file_extends_shipped_recipes_and_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base.yaml").write_text("seed: 7\nsteps: 3\n")
    (tmp_path / "mine.yaml").write_text("extends: [small-math, base.yaml]\nsteps: 4\ndata: [rows.jsonl]\n")
    config = from_flags(monkeypatch, "--recipe", str(tmp_path / "mine.yaml"))
    assert (config.seed, config.steps, config.calibration_steps) == (7, 4, 60)
    assert config.data == [Source(path="rows.jsonl")]  # relative to the working directory, as in a flag


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnak: 3\nseeds: 1\n", r"mine.yaml has unknown keys: 'rnak', 'seeds'"),
        ("recipe: small-math\n", r"unknown keys: 'recipe'"),
        ("extends: mine.yaml\n", r"extends itself: mine.yaml -> mine.yaml"),
        ("extends: {a: 1}\n", r"neither a recipe's name nor a list"),
        ("extends: nothing\n", r"no recipe 'nothing': known are llama-3-8b-code-r32, .*ends in .yaml"),
        ("extends: gone.yaml\n", r"gone.yaml cannot be read"),
        ("- 1\n", r"mine.yaml is no recipe"),
        ("a: [\n", r"mine.yaml is no YAML"),
        ("", r"mine.yaml is no recipe"),
    ],
)
def test_an_unsound_recipe_is_refused_by_its_file(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_recipe(str(path), FitConfig.model_fields.keys() - {"recipe"})


def test_an_invalid_recipe_is_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    (tmp_path / "base.yaml").write_text("alpha: -1\n")
    conflict = "data: [d.jsonl]\nheld_out: [e.jsonl]\nheld_out_fraction: 0.5"
    for text, message in {
        "rnak: 3": "unknown keys: 'rnak'",
        "data: [d.jsonl]\nrank: 0": f"error: {path}: rank: Input should be greater",
        "extends: base.yaml\ndata: [{pth: d}]": f"permitted; {tmp_path}/base.yaml: alpha: Input",
        conflict: f"exclude each other (these are held_out of {path}, held_out_fraction of {path})\n",
    }.items():
        path.write_text(text)
        with pytest.raises(SystemExit) as caught:
            from_flags(monkeypatch, "--recipe", str(path))
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


def test_a_flag_that_wins_over_a_recipe_is_named_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("data: [d.jsonl]\nrank: 4\n")
    with pytest.raises(SystemExit):
        from_flags(monkeypatch, "--recipe", str(path), "--rank", "0")
    assert capsys.readouterr().err.startswith("error: --rank: Input should be greater")


def test_the_pages_sources_and_recipes_are_valid_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    section = page.partition("A source can be an object")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```bash\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    source, *recipes = [shlex.split(line)[3:] for line in "".join(blocks).replace("\n  ", " ").splitlines()]
    [read] = from_flags(monkeypatch, *source).data
    assert read.prompt == "Question: {{ question }}\nAnswer:"
    for flags in recipes[:2]:
        assert from_flags(monkeypatch, *flags).recipe in NAMES
