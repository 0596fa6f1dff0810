"""`training.evaluate` of weights and adapters that the server takes from each prompt."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.keyed import ACME, OTHER, served
from tests.server.service.weighed import make_service, prompts
from tests.training.evaluations import Rows, config, figures_of, write
from training.evaluate import evaluate
from training.evaluation.answerer import AnswerError

pytestmark = pytest.mark.slow
OTHERS_LETTERS = " XYZZYXYZXXZY" * 8


@pytest.fixture(scope="module")
def url(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the address of a server whose adapters `math` and `safety` have statistics of their prompts."""
    service = make_service(tiny_model, tmp_path_factory.mktemp("auto"))
    with pytest.MonkeyPatch.context() as patch, served(service, ACME) as client:
        patch.setenv("LORI_API_KEY", ACME)
        yield str(client.base_url).rstrip("/")


def rows(name: str | None) -> Rows:
    return [{"prompt": prompt, "completion": OTHERS_LETTERS} for prompt in prompts(name, 3, seed=21)]


@pytest.mark.parametrize("form", ["prompt", "messages"])
@pytest.mark.parametrize("metric", ["loss", "exact"])
@pytest.mark.parametrize("name", ["math", None])
def test_each_prompt_gets_its_adapter_by_itself(url: str, tmp_path: Path, name: str | None, metric: str, form: str) -> None:
    """The answers to be scored are in another adapter's letters, and say nothing."""
    data = write(tmp_path / "rows.jsonl", rows(name))
    right = figures_of(config(metric, data, url=url, form=form, adapter=[name] if name else []))
    for fields in ({"adapter": ["auto"]}, {"adapter": ["math", "safety"], "weights": ["auto"]}):
        assert figures_of(config(metric, data, url=url, form=form, **fields)) == pytest.approx(right)
    if metric == "loss":
        wrong = figures_of(config(metric, data, url=url, form=form, adapter=["safety"]))
        assert wrong["loss"] != pytest.approx(right["loss"])


def test_what_was_measured_is_said(url: str, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", rows("math"))
    for fields, expected in (
        ({"adapter": ["auto"]}, "auto"),
        ({"adapter": ["math", "safety"], "weights": ["auto", 0.5]}, "auto math@"),
    ):
        measurement = evaluate(config("loss", data, url=url, **fields))
        assert measurement.lines[0].split(maxsplit=1)[1].startswith(expected)


def test_answers_with_the_operator_s_adapter_are_not_measured(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORI_API_KEY", OTHER)
    data = write(tmp_path / "rows.jsonl", rows("math"))
    with pytest.raises(AnswerError, match=r"the key's policy adds intent@\w{12} to every request: expected a key without"):
        evaluate(config("exact", data, url=url, adapter=["auto"]))
