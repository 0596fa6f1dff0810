"""`training.answer`: the base model's own answers, as rows."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lori.base_model import load_base_model
from lori.template import encode, render_prompt
from server.loading import load_service
from server.settings import Settings
from tests.server.live import serve_here
from training.answer import AnswerConfig, answer_rows, main, select_rows, write_answers
from training.data import DataError, Row


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "asked.jsonl"
    rows = [{"prompt": f"{'why ' * i}?", "completion": "because"} if i % 3 else {"prompt": f"{'how ' * i}?"} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def url(tiny_model: Path) -> Iterator[str]:
    """Yield the address of a server in this process."""
    settings = Settings(model=str(tiny_model), dtype="float32", threads=1, kv_cache_gib=0.02)
    with serve_here(load_service(settings)) as client:
        yield str(client.base_url).rstrip("/")


def config_for(data: Path, **changes: object) -> AnswerConfig:
    return AnswerConfig.model_validate({"data": [str(data)], "output": data.with_name("out.jsonl"), "max_tokens": 5} | changes)


def test_rows_can_be_drawn_and_only_the_unanswered_chosen(data: Path) -> None:
    assert len(select_rows(config_for(data))) == 12
    unanswered = select_rows(config_for(data, only_unanswered=True))
    assert len(unanswered) == 4
    assert all("how" in row.prompt_text or row.prompt_text == "?" for row in unanswered)
    drawn = select_rows(config_for(data, num_rows=5))
    assert len(drawn) == 5
    assert drawn == select_rows(config_for(data, num_rows=5))
    assert drawn != select_rows(config_for(data, num_rows=5, seed=1))


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_greedy_answers_equal_those_of_the_base_alone(tiny_model: Path, data: Path, template: str) -> None:
    # Prompts of a batch are padded to one width; the padding must not change the answers.
    config = config_for(data, temperature=0, template=template, batch_tokens=200)
    base = load_base_model(str(tiny_model), torch.float32)
    rows = select_rows(config)
    answers = {str(row["prompt"]): row for row in answer_rows(base, rows, config)}
    for row in rows:
        ids = torch.tensor([encode(base.tokenizer, render_prompt(base.tokenizer, row.prompt, config.template)).ids])
        out = base.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        is_whole = base.tokenizer.eos_token_id in out[0, ids.shape[1] :]
        text = base.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).rstrip("\ufffd")
        if not text.strip():
            assert row.prompt_text not in answers
            continue
        assert answers[row.prompt_text]["completion"] == text
        assert answers[row.prompt_text]["template"] == template
        assert answers[row.prompt_text]["truncated"] == (not is_whole)


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_a_server_answers_as_a_locally_loaded_model_does(tiny_model: Path, url: str, data: Path, template: str) -> None:
    config = config_for(data, temperature=0, template=template)
    rows = select_rows(config)
    server_config = config.model_copy(update={"url": url})
    assert answer_rows(None, rows, server_config) == answer_rows(load_base_model(str(tiny_model), torch.float32), rows, config)


def test_a_server_draws_each_answer_by_its_own_seed(url: str, data: Path) -> None:
    data.write_text('{"prompt": "why?"}\n' * 8)
    config = config_for(data, template="plain", temperature=1.0, url=url)
    rows = select_rows(config)
    texts = [row["completion"] for row in answer_rows(None, rows, config)]
    assert len(set(texts)) > 1
    assert texts == [row["completion"] for row in answer_rows(None, rows, config)]
    assert texts != [row["completion"] for row in answer_rows(None, rows, config.model_copy(update={"seed": 100}))]


@pytest.mark.parametrize("is_served", [False, True])
def test_rows_without_room_or_prompt_are_named_alike(tiny_model: Path, url: str, data: Path, is_served: bool) -> None:
    empty = {"prompt": [{"role": "user", "content": ""}]}
    data.write_text("".join(json.dumps(row) + "\n" for row in ({"prompt": "why?"}, {"prompt": "why " * 999}, empty)))
    config = config_for(data, template="plain", **({"url": url} if is_served else {}))
    base = None if is_served else load_base_model(str(tiny_model), torch.float32)
    with pytest.raises(DataError) as error:
        answer_rows(base, select_rows(config), config)
    assert f"{data} line 2: with an answer of 5 tokens, for the model's context" in str(error.value)
    assert f"empty prompt: 1\n    {data} line 3" in str(error.value)


def test_flags_without_effect_are_refused(data: Path) -> None:
    with pytest.raises(ValueError, match="--threads is for a model that is loaded here, and --url names a server"):
        config_for(data, url="http://127.0.0.1:1", threads=2)
    with pytest.raises(ValueError, match="--concurrency needs --url"):
        config_for(data, concurrency=2)


def test_rows_that_cannot_be_answered_are_left_out_on_request(
    tiny_model: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data.write_text('{"prompt": "why?"}\n{"prompt": ""}\n{"prompt": "' + "why " * 999 + '"}\nnot JSON\n{"prompt": "how?"}\n')
    config = config_for(data, template="plain", on_bad="skip", temperature=0)
    answers = answer_rows(load_base_model(str(tiny_model), torch.float32), select_rows(config), config)
    assert [row["prompt"] for row in answers] == ["why?", "how?"]
    for kind, line in (("missing field", 2), ("too long", 3), ("not JSON", 4)):
        assert f"rows left out, {kind}: 1 ({data} line {line}" in caplog.text


def test_answers_that_are_left_out_are_counted(tiny_model: Path, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    base = load_base_model(str(tiny_model), torch.float32)
    config = config_for(data, max_tokens=1, temperature=9.0, batch_tokens=200)
    num_left = 12 - write_answers(base, select_rows(config), config)
    assert num_left > 0
    assert f"empty answers left out: {num_left}" in caplog.text


def test_an_answer_can_be_right_under_any_template() -> None:
    assert Row(prompt="p").with_completion("text", None, truncated=False) == {
        "prompt": "p", "completion": "text", "template": None, "truncated": False
    }  # fmt: skip


def test_nothing_is_written_over(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = data.read_bytes()
    monkeypatch.setattr("sys.argv", ["answer", "--data", str(data), "--output", str(data.parent)])
    assert main() == 1
    assert "is there already: remove it, or name another" in capsys.readouterr().err
    assert data.read_bytes() == before
