"""Reading training data."""

import json
from pathlib import Path

import pytest

from tests.tiny import tiny_tokenizer
from training.data import DataError, Row, read_rows, tokenize


def write(path: Path, *lines: object) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n" for line in lines))
    return str(path)


def test_reads_both_forms(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    rows = read_rows(write(tmp_path / "d.jsonl", {"prompt": "p", "completion": " c"}, "", {"messages": turns}))
    assert [row.completion for row in rows] == [" c", "hello"]
    assert [row.prompt_text for row in rows] == ["p", "hi"]


def test_a_line_ends_at_a_newline_only(tmp_path: Path) -> None:
    # U+2028 inside a JSON string once cut the line in two.
    rows = read_rows(write(tmp_path / "d.jsonl", {"prompt": "a\u2028b", "completion": "c"}))
    assert rows[0].prompt == "a\u2028b"


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{oops", "line 2: not JSON"),
        ({"completion": "c"}, "line 2: has no 'prompt'"),
        ({"prompt": 3, "completion": "c"}, "line 2: prompt"),
        ({"prompt": "p", "completion": "c", "messages": []}, "line 2: has both"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "line 2: 'messages' must end with an assistant"),
        ({"prompt": "p", "completion": "c", "template": "alpaca"}, "line 2: template"),
        ("[1]", "line 2: "),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, bad: object, said: str) -> None:
    source = write(tmp_path / "d.jsonl", {"prompt": "p", "completion": "c"}, bad)
    with pytest.raises(DataError, match=said):
        read_rows(source)


def test_every_bad_line_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 bad rows.*line 1: .*line 3: "):
        read_rows(write(tmp_path / "d.jsonl", {"x": 1}, {"prompt": "p", "completion": "c"}, {"prompt": ""}))


def test_rows_without_completion_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write(tmp_path / "d.jsonl", {"prompt": "p"}, {"prompt": "q", "completion": "c"})
    assert len(read_rows(source)) == 1
    assert "1 rows without a completion" in caplog.text
    assert len(read_rows(source, needs="prompt")) == 2


def test_a_file_without_any_usable_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no usable row"):
        read_rows(write(tmp_path / "d.jsonl", {"prompt": "p"}))


def test_a_hub_data_set_that_cannot_be_loaded_is_named() -> None:
    with pytest.raises(DataError, match="'nobody/nothing' is neither a file nor a hub data set"):
        read_rows("nobody/nothing")


def test_the_completion_ends_with_end_of_text_and_follows_the_prompt() -> None:
    tokenizer = tiny_tokenizer()
    [example] = tokenize(tokenizer, [Row(prompt="Ask:", completion=" yes")], ["plain"], 100)
    assert example.num_prompt == 4
    assert example.ids[4:] == (*tokenizer(" yes").input_ids, tokenizer.eos_token_id)


def test_a_truncated_completion_gets_no_end_of_text() -> None:
    tokenizer = tiny_tokenizer()
    [example] = tokenize(tokenizer, [Row(prompt="Ask:", completion=" ye", truncated=True)], ["plain"], 100)
    assert tokenizer.eos_token_id not in example.ids


def test_a_row_s_own_template_wins() -> None:
    tokenizer = tiny_tokenizer()
    plain, chat = tokenize(
        tokenizer, [Row(prompt="p", completion=" c"), Row(prompt="p", completion=" c", template="chat")], ["plain"], 100
    )
    assert tokenizer.decode(plain.ids) == "p c<|end|>"
    assert tokenizer.decode(chat.ids) == "<|user|>p<|end|><|assistant|>c<|end|>"


def test_long_rows_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    rows = [Row(prompt="p" * 50, completion="c"), Row(prompt="p", completion="c")]
    assert len(tokenize(tiny_tokenizer(), rows, ["plain"], 20)) == 1
    assert "1 examples longer than 20 tokens" in caplog.text
    with pytest.raises(DataError, match="no example is left: 1 are longer"):
        tokenize(tiny_tokenizer(), rows[:1], ["plain"], 20)
