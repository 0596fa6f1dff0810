"""`training.chats`: rows as chats."""

import json
from pathlib import Path
from typing import Any

import pytest

from training.chats import ChatsConfig, chats, main
from training.data import DataError, Source, read_rows

NUM_ROWS = 200


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = [{"prompt": f"How much is {i}?", "completion": f" {i}", "label": i} for i in range(NUM_ROWS)]
    return write(tmp_path / "data.jsonl", rows)


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    rows = [{"prompt": "Hello", "completion": " Hi."}, {"prompt": "cut", "completion": "off", "truncated": True}]
    return write(tmp_path / "earlier.jsonl", rows)


def config_for(data: Path, **changes: Any) -> ChatsConfig:
    return ChatsConfig.model_validate({"data": [str(data)], "output": data.with_name("out.jsonl")} | changes)


def test_each_row_s_prompt_becomes_the_last_message_and_its_fields_stay(data: Path, earlier: Path, tmp_path: Path) -> None:
    config = config_for(data, earlier=[str(earlier)], system_fraction=0.5, earlier_fraction=0.5)
    rows = chats(config)
    assert [(row["prompt"][-1], row["completion"], row["label"]) for row in rows] == [
        ({"role": "user", "content": f"How much is {i}?"}, f" {i}", i) for i in range(NUM_ROWS)
    ]
    with_system = [row for row in rows if row["prompt"][0]["role"] == "system"]
    later = [row for row in rows if {"role": "assistant", "content": "Hi."} in row["prompt"]]
    assert 70 < len(with_system) < 130
    assert 70 < len(later) < 130
    assert max(len(row["prompt"]) for row in rows) == 6  # a system prompt, two earlier turns, the message
    assert not any(message["content"] == "off" for row in rows for message in row["prompt"])
    read = read_rows(str(write(tmp_path / "read.jsonl", rows)))
    assert {row.template for row in read} == {"chat"}
    assert rows == chats(config)
    assert rows != chats(config.model_copy(update={"seed": 1}))


def test_nothing_is_added_without_earlier_rows_or_system_prompts(data: Path, earlier: Path) -> None:
    rows = chats(config_for(data, earlier=[str(earlier)], system_fraction=0, earlier_fraction=0))
    assert all(len(row["prompt"]) == 1 for row in rows)


def test_a_rows_own_conversation_stays(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    data = write(tmp_path / "data.jsonl", [{"prompt": messages, "completion": "So."}])
    [row] = chats(config_for(data, system_fraction=1))
    assert row["prompt"] == messages


def test_prompts_are_written_in_frames(data: Path, tmp_path: Path) -> None:
    frames = tmp_path / "frames.txt"
    frames.write_text('"First:\\n{{ prompt }}"\n\n"{{ prompt }} And then?"\n')
    rows = chats(config_for(data, frames=frames, system_fraction=0, num_rows=40))
    prompts = [row["prompt"][-1]["content"] for row in rows]
    assert len(prompts) == 40
    assert {text.partition("How")[0] for text in prompts} == {"", "First:\n"}
    assert {text.partition("?")[2] for text in prompts} == {"", " And then?"}


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "no line with text"),
        ("{{ prompt }}", "no JSON string"),
        ('"always the same"', "expected a JSON string"),
        ("3", "expected"),
        ('"{{ prompt }} {{ other }}"', "no Jinja template"),
        ('"{{ prompt"', "no Jinja template"),
        ('"{{ prompt + 1 }}"', "no Jinja template"),
        ('"\\ud83d {{ prompt }}"', "line 1 .*surrogates not allowed"),
        ('"{{ prompt }}"\n\n3', "line 3"),
        ('"{{ prompt }}\u2028"\n3', "line 2"),
    ],
)
def test_invalid_frames_are_named(data: Path, tmp_path: Path, content: str, fault: str) -> None:
    frames = tmp_path / "frames.txt"
    frames.write_text(content)
    with pytest.raises(DataError, match=fault):
        chats(config_for(data, frames=frames))


def test_a_frame_that_fails_on_a_row_names_the_row(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", [{"prompt": "a prompt to try frames with, and more"}, {"prompt": "short"}])
    frames = tmp_path / "frames.txt"
    frames.write_text('"{{ prompt }}{{ 1 / (prompt | length - 5) }}"')
    with pytest.raises(DataError, match=r"data\.jsonl line 2: the frame .* fails: "):
        chats(config_for(data, frames=frames))


def test_no_row_is_its_own_earlier_turn(tmp_path: Path) -> None:
    """With its own question and answer as an earlier turn, a row would teach copying."""
    data = write(tmp_path / "data.jsonl", [{"prompt": f"How much is {i}?", "completion": f" {i}"} for i in range(4)])
    rows = [row for seed in range(20) for row in chats(config_for(data, earlier=[str(data)], earlier_fraction=1, seed=seed))]
    assert any(len(row["prompt"]) > 3 for row in rows)
    assert not any(row["prompt"][-1] in row["prompt"][:-1] for row in rows)
    messages = [{"role": "user", "content": "How much is 1?"}]
    talks = write(tmp_path / "talks.jsonl", [{"prompt": messages, "completion": " 1"}])
    rows = [row for seed in range(20) for row in chats(config_for(talks, earlier=[str(data)], earlier_fraction=1, seed=seed))]
    assert any(len(row["prompt"]) > 3 for row in rows)
    assert not any(row["prompt"][-1] in row["prompt"][:-1] for row in rows)


def test_bad_rows_are_named_or_left_out(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", [{"prompt": "a"}, {"completion": "b"}])
    with pytest.raises(DataError, match=r"data\.jsonl line 2"):
        chats(config_for(data))
    assert len(chats(config_for(data, on_bad="skip"))) == 1


def test_earlier_rows_without_an_answer_are_named(data: Path, tmp_path: Path) -> None:
    earlier = write(tmp_path / "earlier.jsonl", [{"prompt": "Hello", "completion": " Hi."}, {"prompt": "Why?"}])
    with pytest.raises(DataError, match=r"earlier\.jsonl line 2"):
        chats(config_for(data, earlier=[str(earlier)]))
    write(earlier, [{"prompt": "Hello", "completion": " Hi", "truncated": True}])
    with pytest.raises(DataError, match="--earlier has conversations and cut answers alone"):
        chats(config_for(data, earlier=[str(earlier)]))


def test_an_output_among_the_inputs_is_refused(data: Path) -> None:
    with pytest.raises(ValueError, match="would be lost"):
        config_for(data, output=data)


def test_the_program_writes_once(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = data.with_name("chats.jsonl")
    source = Source(path=str(data), prompt="{{ prompt[:-1] }}", completion="{{ completion }}").model_dump_json()
    monkeypatch.setattr("sys.argv", ["chats", "--data", source, "--output", str(output)])
    assert main() == 0
    assert f"wrote {NUM_ROWS} rows" in capsys.readouterr().out
    assert json.loads(output.read_text().splitlines()[3])["prompt"][-1]["content"] == "How much is 3"
    assert main() == 1
    assert "is there already" in capsys.readouterr().err
