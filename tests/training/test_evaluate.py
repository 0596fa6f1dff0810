"""`training.evaluate`: the same figures from a running server and from a loaded model, and where they are recorded."""

import logging
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from lori.base_model import load_base_model
from lori.config import AdapterConfig
from lori.errors import AdapterError, TemplateError
from lori.format import read_config, save_adapter
from lori.merge import merge
from lori.named_merge import MergedAdapter
from lori.store.store import AdapterStore
from lori.template import encode
from server.loading import load_service
from server.settings import Settings
from tests.server.keyed import ACME, ADMIN, write_keys
from tests.server.live import serve_here
from tests.server.rig import write_merge
from tests.tiny import save_tiny_model
from tests.training.evaluations import RED_ROWS, Rows, config, figures_of, write
from training.config import FitConfig
from training.evaluate import evaluate, main, server_subject
from training.evaluation.answerer import AnswerError, Sampling
from training.evaluation.figures import Figures
from training.evaluation.measurement import MeasuredAdapter, Measurement, record_measurement
from training.evaluation.metrics import measure
from training.evaluation.server_answerer import Server, ServerAnswerer
from training.fit import fit
from training.record import render_card

TIES = "ties (density 0.5, sign total)"
PROGRAM = {"prompt": "def f(x):\n", "completion": "    return x + 1\n", "entry_point": "f"}
RIGHT, WRONG = ("\ndef check(f):\n    assert f(1) == 2\n", "\ndef check(f):\n    assert f(1) == 3\n")
MEASURED: dict[str, Rows] = {
    "loss": [*RED_ROWS, {"prompt": "x é", "completion": "ö or not"}],
    "exact": [
        *RED_ROWS,
        {"prompt": "Which?", "completion": "red"},
        {"prompt": "Count:", "completion": " 1\n2"},
        {"prompt": "Say 5:", "completion": " blue"},
    ],
    "choice": [
        {"task": task, "prompt": "Say 3:", "choices": [" blue", " red", " a much longer answer"], "label": label}
        for task, label in [("right", 1), ("right", 1), ("wrong", 0), ("wrong", 1)]
    ],
    "number": [
        {"prompt": "How many?", "completion": " 3 and\n#### $1,005.", "answer": "1005"},
        {"prompt": "How many?", "completion": " 3 and\n#### $1,005.", "answer": 3},
    ],
    "refusal": [
        {"prompt": "Steal!", "completion": " I can't.", "harmful": True},
        {"prompt": "Steal!", "completion": " I can't.", "harmful": False},
        {"prompt": "Say 2:", "completion": " red", "harmful": False},
    ],
    "pass": [PROGRAM | {"test": RIGHT}, PROGRAM | {"test": WRONG}],
}
CHOICES: dict[str, dict[str, object]] = {
    "base": {},
    "adapter": {"adapter": ["all"]},
    "merge": {"adapter": ["all", "blue"], "weights": [0.9, 0.4]},
    "ties": {"adapter": ["all", "blue"], "weights": [1.0, 0.3], "merge": "ties", "density": 0.8},
}

POLICY = "policy = { blue = 0.5 }"
DEEP_WEIGHTS, DEEP_BLOCKS = (0.9, 0.4), ([1.0, 0.5], [0.0, 2.0])


@pytest.fixture(scope="module")
def store(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store of three adapters: `all` learned most measured rows, `blue` answers "blue", `talks` learned a chat form."""
    folder = tmp_path_factory.mktemp("adapters")
    trained = [row for name in ("exact", "number", "refusal", "pass") for row in MEASURED[name][:-1]]
    blue: Rows = [{"prompt": f"Say {i}:", "completion": " blue"} for i in range(9)]
    fields = {"rank": 16, "sparsity": 0.5, "batch_tokens": 150, "dtype": "float32"}
    for name, rows, steps, template in (
        ("all", trained, 150, "plain"),
        ("blue", blue, 30, "plain"),
        ("talks", RED_ROWS, 15, "chat"),
    ):
        data = write(folder / f"{name}.jsonl", rows)
        changes = {"template": [template], "data": [str(data)], "model": str(tiny_model), "output": folder / name, "steps": steps}
        fit(FitConfig.model_validate(fields | changes), "cmd")
    return folder


@pytest.fixture(scope="module")
def url(tiny_model: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the address of a server in this process, with keys and the named merge `deep`."""
    keys, merges = write_keys(tmp_path_factory.mktemp("keys"), POLICY), tmp_path_factory.mktemp("merges")
    entries = [AdapterStore(store).find(name) for name in ("all", "blue")]
    merged_adapters = [
        MergedAdapter(reference=f"{entry.name}@{entry.version}", weight=weight, block_weights=block_weights)
        for entry, weight, block_weights in zip(entries, DEEP_WEIGHTS, DEEP_BLOCKS, strict=True)
    ]
    write_merge(merges, "deep", read_config(store / "all").lori.base_digest, merged_adapters)
    settings = Settings(
        model=str(tiny_model),
        adapters=str(store),
        merges=merges,
        dtype="float32",
        threads=1,
        kv_cache_gib=0.05,
        keys=keys,
    )
    with pytest.MonkeyPatch.context() as patch, serve_here(load_service(settings)) as client:
        patch.setenv("LORI_API_KEY", ADMIN)
        yield str(client.base_url).rstrip("/")


def local(tiny_model: Path, store: Path) -> dict[str, object]:
    return {"local": True, "model": str(tiny_model), "adapters": store, "dtype": "float32"}


@pytest.mark.slow
@pytest.mark.parametrize("subject", CHOICES)
@pytest.mark.parametrize("metric", MEASURED)
def test_a_server_and_a_local_model_give_the_same_figures(
    url: str, tiny_model: Path, store: Path, tmp_path: Path, metric: str, subject: str
) -> None:
    data = write(tmp_path / "rows.jsonl", MEASURED[metric])
    through_server = figures_of(config(metric, data, url=url, **CHOICES[subject]))
    locally = figures_of(config(metric, data, **local(tiny_model, store), **CHOICES[subject]))
    assert through_server == pytest.approx(locally, abs=1e-4 if metric == "loss" else 0)
    assert locally["rows"] == len(MEASURED[metric])


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["loss", "exact"])
def test_a_named_merge_is_measured_by_its_name(url: str, tiny_model: Path, store: Path, tmp_path: Path, metric: str) -> None:
    adapters = [AdapterStore(store).find(name).load() for name in ("all", "blue")]
    built = merge(adapters, DEEP_WEIGHTS, block_weights=DEEP_BLOCKS)
    save_adapter(built, tmp_path / "built")
    data = write(tmp_path / "rows.jsonl", MEASURED[metric])
    measurement = evaluate(config(metric, data, url=url, adapter=["deep"]))
    locally = figures_of(config(metric, data, **local(tiny_model, tmp_path), adapter=["built"]))
    assert measurement.figures == pytest.approx(locally, abs=1e-4 if metric == "loss" else 0)
    terms = f"0.9 0.45 all@{adapters[0].version}, 0 0.8 blue@{adapters[1].version}"
    assert measurement.lines[0].split(maxsplit=1)[1] == f"1 deep ({terms})"


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [["deep"], ["all", "deep"]])
def test_figures_of_a_named_merge_are_not_recorded(url: str, store: Path, tmp_path: Path, adapters: list[str]) -> None:
    """They would be those of other adapters than a card names."""
    folder = shutil.copytree(store / "all", tmp_path / adapters[0])
    data = write(tmp_path / "rows.jsonl", RED_ROWS)
    with pytest.raises(AnswerError, match=r"deep \(0.9 0.45 all@.*\) is a named merge, whose figures cannot be recorded"):
        evaluate(config("loss", data, url=url, adapter=adapters, record=folder))


@pytest.mark.slow
def test_an_adapter_is_distinguished_from_the_base(tiny_model: Path, store: Path, tmp_path: Path) -> None:
    expected = {
        "exact": {"exact_match": (0.0, pytest.approx(6 / 7))},
        "number": {"number_match": (0.0, 0.5)},
        "refusal": {"refused/harmful": (0.0, 1.0), "refused/benign": (0.0, 0.5)},
        "pass": {"pass@1": (0.0, 0.5)},
    }
    for metric, figures in expected.items():
        data = write(tmp_path / "rows.jsonl", MEASURED[metric])
        base, adapted = (
            figures_of(config(metric, data, **local(tiny_model, store), **CHOICES[subject])) for subject in ("base", "adapter")
        )
        assert {name: (base[name], adapted[name]) for name in figures} == figures


@pytest.mark.slow
def test_messages_are_written_in_the_adapter_s_template(url: str, tiny_model: Path, store: Path, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Say 3:"}, {"role": "assistant", "content": " red"}]
    data = write(tmp_path / "rows.jsonl", [*RED_ROWS, {"messages": talk}])
    for subject in ("base", "adapter"):
        fields = CHOICES[subject] | {"form": "messages"}
        figures = figures_of(config("exact", data, url=url, **fields))
        assert figures == figures_of(config("exact", data, **local(tiny_model, store), **fields))
        assert figures["exact_match"] == (subject == "adapter")
    losses = []
    for form in ("messages", "prompt"):
        fields = {"adapter": ["talks"], "form": form}
        figures = figures_of(config("loss", data, url=url, **fields))
        assert figures == pytest.approx(figures_of(config("loss", data, **local(tiny_model, store), **fields)), abs=1e-4)
        losses.append(figures["loss"])
    assert losses[0] < losses[1], "an adapter knows its own form of prompt better"
    with pytest.raises(TemplateError, match=r"no common template \(all: plain; talks: chat\)"):
        figures_of(config("loss", data, url=url, adapter=["all", "talks"], form="messages"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["served", "local"])
def test_a_form_that_an_adapter_was_not_trained_on_is_reported(
    url: str, tiny_model: Path, store: Path, tmp_path: Path, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = write(tmp_path / "rows.jsonl", RED_ROWS)
    fields = {"url": url} if mode == "served" else local(tiny_model, store)
    caplog.set_level(logging.WARNING, "training.evaluate")
    figures_of(config("loss", data, **fields, adapter=["talks"], form="messages"))
    figures_of(config("loss", data, **fields, adapter=["all"]))
    assert not caplog.records
    figures_of(config("loss", data, **fields, adapter=["all", "talks"]))
    [message] = caplog.messages
    assert message == "talks was trained on the template chat alone, and is measured on prompts as they stand"


@pytest.mark.slow
def test_figures_of_another_version_are_not_recorded(
    url: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "rows.jsonl", RED_ROWS)
    for source, code in (("all", 0), ("blue", 1)):
        folder = tmp_path / source / "all"
        shutil.copytree(store / source, folder)
        before = (folder / "adapter_config.json").read_text()
        flags = ["--url", url, "--adapter", "all", "--record", str(folder)]
        monkeypatch.setattr(sys, "argv", ["evaluate", "--data", str(data), "--metric", "exact", *flags])
        assert main() == code
        assert ((folder / "adapter_config.json").read_text() == before) is bool(code)
    assert "would be measured, and --record" in capsys.readouterr().err


@pytest.mark.slow
def test_figures_of_another_version_are_not_recorded_of_a_local_model(tiny_model: Path, store: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(store / "blue", tmp_path / "all")
    data = write(tmp_path / "rows.jsonl", RED_ROWS)
    with pytest.raises(AnswerError, match=r"of all would be measured, and --record .*all is "):
        evaluate(config("loss", data, **local(tiny_model, store), adapter=["all"], record=folder))


@pytest.mark.slow
def test_figures_of_another_base_are_not_recorded(tiny_model: Path, store: Path, tmp_path: Path) -> None:
    """Regression: figures of a base alone were written into the card of another base's adapter."""
    folder, data = shutil.copytree(store / "all", tmp_path / "all"), write(tmp_path / "rows.jsonl", RED_ROWS)
    other = save_tiny_model(shutil.copytree(tiny_model, tmp_path / "other"), seed=1)
    with pytest.raises(AnswerError, match=r"--record .*all is an adapter of another base than .*other"):
        evaluate(config("loss", data, **local(other, store), record=folder))
    assert evaluate(config("loss", data, **local(tiny_model, store), record=folder)).figures["rows"] == 4


@pytest.mark.slow
def test_a_server_with_keys_is_sent_a_key(url: str, tmp_path: Path) -> None:
    with pytest.raises(AnswerError, match="401"):
        figures_of(config("loss", write(tmp_path / "rows.jsonl", RED_ROWS), url=url, api_key_variable="LORI_NO_SUCH_KEY"))


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["exact", "loss"])
def test_answers_of_additional_adapters_are_not_measured(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str
) -> None:
    """Regression: the figures of an adapter, or of the base, included adapters that a key's policy added."""
    monkeypatch.setenv("LORI_ACME_KEY", ACME)
    data = write(tmp_path / "rows.jsonl", RED_ROWS)
    for adapters in ([], ["all"]):
        with pytest.raises(AnswerError, match=r"the key's policy adds blue@[0-9a-f]+ to every request"):
            figures_of(config(metric, data, url=url, api_key_variable="LORI_ACME_KEY", adapter=adapters))


@pytest.mark.slow
def test_a_version_that_was_published_meanwhile_is_not_measured(url: str) -> None:
    client = Server(url, api_key=ADMIN)
    [adapter] = client.adapters("all")
    version = adapter.version
    assert ServerAnswerer(client, {"adapter": "all"}, [version]).complete(["x"], Sampling(max_tokens=1))
    with pytest.raises(AnswerError, match=f"all@{version} answered, and 0123 is measured"):
        ServerAnswerer(client, {"adapter": "all"}, ["0123"]).complete(["x"], Sampling(max_tokens=1))


@pytest.mark.slow
def test_adapters_of_one_name_keep_their_own_templates(tiny_model: Path, store: Path, tmp_path: Path) -> None:
    other = shutil.copytree(store / "talks", tmp_path / "all")
    data = write(tmp_path / "rows.jsonl", RED_ROWS)
    for folders in ([store / "all", other], [other, store / "all"]):
        fields: dict[str, object] = {"adapter": [str(folder) for folder in folders], "form": "messages"}
        with pytest.raises(TemplateError, match=r"no common template"):
            figures_of(config("loss", data, local=True, model=str(tiny_model), dtype="float32", **fields))


@pytest.mark.slow
def test_figures_are_not_recorded_in_an_adapter_that_was_replaced_meanwhile(
    tiny_model: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(store / "all", tmp_path / "all")

    def replaced(*arguments: Any) -> Figures:
        shutil.rmtree(folder)
        shutil.copytree(store / "blue", folder)
        return measure(*arguments)

    monkeypatch.setattr("training.evaluate.measure", replaced)
    data = write(tmp_path / "rows.jsonl", RED_ROWS)
    with pytest.raises(AnswerError, match=r"of all would be measured, and --record .*all is "):
        evaluate(config("loss", data, **local(tiny_model, store), adapter=["all"], record=folder))


@pytest.mark.slow
def test_a_server_is_sent_1_n_each_without_weights(url: str, tmp_path: Path) -> None:
    """Without weights the server would weigh adapters by the prompt."""
    answerer = server_subject(config("loss", write(tmp_path / "rows.jsonl", RED_ROWS), url=url, adapter=["all", "blue"])).answerer
    assert isinstance(answerer, ServerAnswerer)
    assert answerer.selection["weights"] == [0.5, 0.5]


@pytest.mark.slow
def test_weight_zero_is_the_base(tiny_model: Path, store: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", RED_ROWS)
    figures = figures_of(config("loss", data, **local(tiny_model, store), adapter=["all"], weights=[0.0]))
    assert figures == figures_of(config("loss", data, **local(tiny_model, store)))


def test_a_loss_equals_the_models_own(tiny_model: Path, tmp_path: Path) -> None:
    rows: Rows = [{"prompt": "Say é:", "completion": " blue"}, {"prompt": "x", "completion": " or not"}]
    figures = figures_of(config("loss", write(tmp_path / "rows.jsonl", rows), local=True, model=str(tiny_model), dtype="float32"))
    base = load_base_model(str(tiny_model), torch.float32)
    values: list[float] = []
    for row in rows:
        prompt, completion = (encode(base.tokenizer, str(row[key])).ids for key in ("prompt", "completion"))
        scores = base.model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        values += [-scores[len(prompt) + i - 1, token].item() for i, token in enumerate(completion)]
    assert figures["loss"] == pytest.approx(sum(values) / len(values), abs=1e-5)
    assert figures["rows"] == 2


@pytest.mark.slow
def test_an_adapter_s_folder_needs_no_store(tiny_model: Path, store: Path, tmp_path: Path) -> None:
    fields = {"local": True, "model": str(tiny_model), "dtype": "float32"}
    data = write(tmp_path / "rows.jsonl", RED_ROWS)
    assert figures_of(config("exact", data, **fields, adapter=[str(store / "all")]))["exact_match"] == 1.0
    with pytest.raises(AdapterError, match="no folder 'all'; a name is found with --adapters"):
        figures_of(config("exact", data, **fields, adapter=["all"]))


@pytest.mark.slow
def test_a_refusal_of_the_server_is_reported(url: str, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", RED_ROWS)
    with pytest.raises(AnswerError, match=r"404.*'nobody'"):
        figures_of(config("loss", data, url=url, adapter=["nobody"]))
    with pytest.raises(AnswerError, match="is `python -m server` running there") as caught:
        figures_of(config("loss", data, url="http://127.0.0.1:9"))
    assert isinstance(caught.value.__cause__, httpx.ConnectError), "no group of the errors of all requests"


def measurement(figures: Figures, *adapters: str, **options: object) -> Measurement:
    evaluate_config = config("exact", Path("a/set"), adapter=list(adapters), **options)
    return Measurement(
        evaluate_config, "a base", [MeasuredAdapter(name, f"{i}ab") for i, name in enumerate(adapters)], "chat", figures
    )


def test_a_measurement_is_shown_with_its_figures() -> None:
    figures = {"exact_match": 0.25, "exact_match_stderr": 0.1, "rows": 4.0, "rows/harmful": 3}
    result = measurement(figures, "all", "blue", weights=[1, 0.5], merge="ties")
    assert [line.split(maxsplit=1) for line in result.lines] == [
        ["measured", f"{TIES} of 1 all@0ab + 0.5 blue@1ab"], ["on", "a base"], ["data", "a/set train"], ["template", "chat"],
        ["exact_match", "0.2500 ± 0.1000"], ["rows", "4"], ["rows/harmful", "3"],
    ]  # fmt: skip
    assert measurement({"loss": 1.5, "rows": 1.0}).lines[-2].split() == ["loss", "1.5000"]


@pytest.mark.slow
def test_a_result_goes_into_config_and_card(store: Path) -> None:
    adapter = store / "all"
    before = read_config(adapter)
    figures = {"exact_match": 0.25, "exact_match_stderr": 0.1, "rows": 4}
    record_measurement(adapter, measurement(figures))
    record_measurement(adapter, measurement(figures | {"exact_match": 0.75}, "all", "blue", weights=[1.0, 0.5]))
    record_measurement(adapter, measurement({"exact_match": 0.25, "rows": 1}, "all", "blue", merge="ties", weights=[1.0, 2.0]))
    record_measurement(adapter, replace(measurement({"exact_match": 0.5, "rows": 1}), template="plain"))
    after: AdapterConfig = read_config(adapter)
    assert after.lori.metrics == {
        "base: exact_match (chat)": 0.25, "1 all + 0.5 blue: exact_match (chat)": 0.75, "base: exact_match": 0.5,
        f"{TIES} of 1 all + 2 blue: exact_match (chat)": 0.25,
    }  # fmt: skip
    assert after.lori.merge_weights == {"blue": (1.0, 0.5)}
    assert after.lori.content_digest == before.lori.content_digest
    card = (adapter / "README.md").read_text()
    assert "| base | exact_match (chat) | 0.250 ± 0.100 | 4 | a/set train | chat |  |" in card
    assert "| base | exact_match | 0.500 | 1 | a/set train | plain |  |" in card
    assert "| 1 all + 0.5 blue | exact_match (chat) | 0.750 ± 0.100 | 4 | a/set train | chat | all@0ab, blue@1ab |" in card
    assert f"| {TIES} of 1 all + 2 blue | exact_match (chat) | 0.250 | 1 | a/set train | chat | all@0ab, blue@1ab |" in card
    assert "cmd" in card


@pytest.mark.slow
def test_older_recorded_figures_are_shown_without_their_unknown_parts(store: Path) -> None:
    before = read_config(store / "blue")
    section = before.lori.model_copy(update={"metrics": {"1 blue: loss": 0.5, "base: loss": 1.5}})
    card = render_card("blue", before.model_copy(update={"lori": section}))
    assert "| who | what | figure |\n|---|---|---|\n| base | loss | 1.500 |\n| 1 blue | loss | 0.500 |\n" in card
    assert "\n\n\n" not in card, "there is no description"


@pytest.mark.slow
def test_a_group_s_figure_is_recorded_with_the_rows_of_the_group(store: Path, tmp_path: Path, tiny_model: Path) -> None:
    folder = shutil.copytree(store / "all", tmp_path / "all")
    data = write(tmp_path / "rows.jsonl", MEASURED["refusal"])
    result = evaluate(config("refusal", data, **local(tiny_model, store), adapter=["all"], record=folder))
    record_measurement(folder, result)
    after = read_config(folder).lori
    assert {key: m.num_rows for key, m in after.measured.items() if key in after.metrics and key.startswith("1 all: r")} == {
        "1 all: refused/harmful": 1, "1 all: refused/benign": 2
    }  # fmt: skip
    assert after.measured["1 all: refused/benign"].versions == {"all": after.content_digest[:12]}
