"""Reading and tokenizing of training data."""

import json
import logging
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from lori.errors import TemplateError
from tests.tiny import tiny_tokenizer
from training.data import DataError, Faults, Row, read_rows, tokenize, tokenize_pairs

GOOD = {"prompt": "p", "completion": " c"}


def write(path: Path, *lines: object) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)) + "\n" for line in lines))
    return str(path)


def test_reads_both_forms(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    rows = read_rows(write(tmp_path / "d.jsonl", GOOD, "", {"messages": turns}))
    assert [row.completion for row in rows] == [" c", "hello"]
    assert [row.prompt_text for row in rows] == ["p", "hi"]
    assert [row.origin for row in rows] == [f"{tmp_path}/d.jsonl line 1", f"{tmp_path}/d.jsonl line 3"]


def test_fields_that_training_does_not_read_are_kept(tmp_path: Path) -> None:
    [row] = read_rows(write(tmp_path / "d.jsonl", GOOD | {"origin": "here", "label": 3}))
    assert row.model_extra == {"origin": "here", "label": 3}


@pytest.mark.parametrize("lines", [("prompt,completion", "a,b", "c,d"), ([GOOD, GOOD],), ("[", json.dumps(GOOD), "]")])
def test_the_expected_form_is_shown_once_for_a_file_of_another_form(tmp_path: Path, lines: tuple[object, ...]) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(write(tmp_path / "d", *lines))
    assert str(caught.value).count("Expected a JSON object on each line (JSON Lines)") == 1


def test_a_fault_in_json_lines_has_no_hint_of_the_form(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(write(tmp_path / "d", {"prompt": "p"}))
    assert "JSON Lines" not in str(caught.value)


def test_a_line_ends_at_a_newline_only(tmp_path: Path) -> None:
    # Regression: U+2028 inside a JSON string split the line.
    rows = read_rows(write(tmp_path / "d.jsonl", {"prompt": "a\u2028b", "completion": "c"}))
    assert rows[0].prompt == "a\u2028b"


def test_a_byte_order_mark_and_windows_newlines_are_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "p", "completion": "c"}\r\n\r\n{"prompt": "q", "completion": "d"}')
    assert [row.prompt for row in read_rows(str(path))] == ["p", "q"]


@pytest.mark.parametrize(
    ("bad", "kind", "detail"),
    [
        ("{oops", "not JSON", "line 2: Expecting property name"),
        ('{"prompt": ' + "[" * 10**5, "not JSON", "line 2: maximum recursion"),
        ("[1]", "not an object", "line 2: found list"),
        ("null", "not an object", "line 2: found NoneType"),
        ({"completion": "c"}, "missing field", "line 2: has no 'prompt'"),
        ({"prompt": None, "completion": "c"}, "missing field", "line 2: has no 'prompt'"),
        ({"prompt": "p"}, "no completion", "line 2"),
        ({"prompt": "p", "completion": None}, "no completion", "line 2"),
        ({"prompt": "p", "completion": ""}, "empty completion", "line 2"),
        ({"prompt": "p", "completion": " \n\u00a0"}, "empty completion", "line 2"),
        ({"prompt": 3, "completion": "c"}, "wrong type", "line 2: prompt"),
        ({"prompt": "p", "completion": ["c"]}, "wrong type", "line 2: completion"),
        ({"prompt": "p", "completion": "c", "messages": []}, "two forms", "line 2: has both"),
        ({"prompt": "p", "completion": "c", "chosen": "a", "rejected": "b"}, "two forms", "line 2: has both"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "wrong value", "line 2: 'messages' must end with an assistant"),
        ({"prompt": "p", "completion": "c", "template": "alpaca"}, "wrong value", "line 2: template"),
        ({"prompt": "p", "completion": "", "truncated": True}, "wrong value", "line 2: is 'truncated'"),
        ({"prompt": "p", "chosen": "a"}, "missing field", "line 2: has one of"),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "c"}]}, "missing field", "line 2: messages.0.content"),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "no completion", "line 2: has 'chosen' and 'rejected'"),
        ('{"prompt": "p", "completion": "\\ud800"}', "wrong value", "line 2: completion: holds half of a surrogate"),
    ],
)
def test_a_bad_line_is_named_with_its_kind(tmp_path: Path, bad: object, kind: str, detail: str) -> None:
    source = write(tmp_path / "d.jsonl", GOOD, bad)
    with pytest.raises(DataError) as caught:
        read_rows(source)
    assert str(caught.value).startswith(f"bad rows in the data: 1\n  {kind}: 1\n    {source} {detail}")
    faults = Faults("skip")
    assert [row.origin for row in read_rows(source, faults=faults)] == [f"{source} line 1"]
    assert faults.counts == {kind: 1}


def test_bytes_that_are_no_utf8_are_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "caf\xe9"}\n' + json.dumps(GOOD).encode())
    faults = Faults("skip")
    assert len(read_rows(str(path), faults=faults)) == 2
    assert faults.counts == {"not UTF-8": 1}
    with pytest.raises(DataError, match=r"line 2: byte 16: invalid"):
        read_rows(str(path))


def test_every_bad_line_of_every_source_is_named_at_once(tmp_path: Path) -> None:
    faults = Faults()
    for name, lines in {"a": [{"x": 1}, GOOD, "{"], "b": [{"prompt": "p"}, "{"]}.items():
        read_rows(write(tmp_path / f"{name}.jsonl", *lines), faults=faults)
    with pytest.raises(DataError) as caught:
        faults.raise_or_warn()
    lines = str(caught.value).replace(f"{tmp_path}/", "").splitlines()
    assert [line.partition(" (")[0] for line in lines] == [
        "bad rows in the data: 4",
        "  missing field: 1",
        "    a.jsonl line 1: has no 'prompt' and no 'messages'",
        "  not JSON: 2",
        "    a.jsonl line 3: Expecting property name enclosed in double quotes: line 2 column 1",
        "    b.jsonl line 2: Expecting property name enclosed in double quotes: line 2 column 1",
        "  no completion: 1",
        "    b.jsonl line 1",
        "Expected a JSON object on each line",
        "--on-bad skip leaves such rows out, and counts them.",
    ]


def test_a_refusal_names_ten_of_a_kind_and_counts_the_others(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(write(tmp_path / "d.jsonl", *["{"] * 5000, *[{"y" * 5000: 1}] * 3))
    lines = str(caught.value).splitlines()
    assert lines[:2] == ["bad rows in the data: 5003", "  not JSON: 5000"]
    assert "line 10:" in lines[11]
    assert lines[12:14] == ["    and 4990 more", "  missing field: 3"]
    assert len(str(caught.value)) < 3000


def test_skipped_rows_are_counted_and_ten_of_a_kind_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    faults = Faults("skip")
    source = write(tmp_path / "d.jsonl", *[{"prompt": "p"}] * 12, GOOD, "{")
    assert len(read_rows(source, faults=faults)) == 1
    faults.raise_or_warn()
    warning, other_warning = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"rows left out, no completion: 12 ({source} line 1, ")
    assert warning.endswith("line 10 and 2 more)")
    assert other_warning.startswith(f"rows left out, not JSON: 1 ({source} line 14; the first: Expecting property name")
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    faults.raise_or_warn()
    assert len(caplog.records) == 2
    assert faults.counts == {"no completion": 12, "not JSON": 1}


def test_prompts_alone_and_empty_answers_are_read_on_request(tmp_path: Path) -> None:
    source = write(tmp_path / "d.jsonl", {"prompt": "p"}, {"prompt": "q", "completion": ""})
    assert len(read_rows(source, needs="prompt")) == 2
    faults = Faults("skip")
    assert len(read_rows(source, needs="completion", faults=faults)) == 1
    assert faults.counts == {"no completion": 1}


def test_a_source_without_any_usable_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no usable row"):
        read_rows(write(tmp_path / "d.jsonl", ""))
    with pytest.raises(DataError, match="no usable row"):
        read_rows(write(tmp_path / "d.jsonl", {"prompt": "p"}), faults=Faults("skip"))


def test_duplicates_are_kept_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write(tmp_path / "d.jsonl", GOOD, GOOD, GOOD | {"label": 1}, {"prompt": "p", "completion": " d"})
    with caplog.at_level(logging.INFO):
        rows = read_rows(source)
    assert caplog.messages == [f"{source}: rows that repeat another's prompt and completion: 2"]
    assert len(tokenize(tiny_tokenizer(), rows, ["plain"], 100)) == 4


def test_the_completion_ends_with_end_of_text_and_follows_the_prompt() -> None:
    tokenizer = tiny_tokenizer()
    [example] = tokenize(tokenizer, [Row(prompt="Ask:", completion=" yes").set_origin("d.jsonl line 4")], ["plain"], 100)
    assert example.num_prompt == 4
    assert example.ids[4:] == (*tokenizer(" yes").input_ids, tokenizer.eos_token_id)
    assert example.origin == "d.jsonl line 4"


def test_the_space_that_a_tokenizer_adds_before_every_text_is_not_learned() -> None:
    """SentencePiece tokenizers do so: by itself, " cat" would be encoded as two spaces and "cat"."""
    letters = {letter: i for i, letter in enumerate("▁:acqt")}
    model = models.BPE(vocab={**letters, "▁c": 6, "▁ca": 7}, merges=[("▁", "c"), ("▁c", "a")], unk_token=":")
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    [example] = tokenize(tokenizer, [Row(prompt="q:", completion=" cat")], ["plain"], 100)
    assert tokenizer.convert_ids_to_tokens(list(example.ids)) == ["▁", "q", ":", "▁ca", "t", "<end>"]
    assert example.num_prompt == 3


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


def test_an_example_is_too_long_by_its_tokens_and_nothing_of_it_is_cut() -> None:
    rows = [Row(prompt="p", completion="c"), Row(prompt="p" * 50, completion="c").set_origin("d.jsonl line 7")]
    faults = Faults("skip")
    assert [len(example) for example in tokenize(tiny_tokenizer(), rows, ["plain"], 20, faults=faults)] == [4]
    assert faults.counts == {"too long": 1}
    with pytest.raises(DataError, match=r"too long: 1\n +d.jsonl line 7: 53 tokens under 'plain', the limit is 20"):
        tokenize(tiny_tokenizer(), rows, ["plain"], 20)
    with pytest.raises(DataError, match="no example is left"):
        tokenize(tiny_tokenizer(), rows[1:], ["plain"], 20, faults=Faults("skip"))


def test_messages_that_the_chat_template_refuses_are_named() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('No system here.') }}{% endif %}"
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    row = Row.model_validate({"messages": turns}).set_origin("d.jsonl line 1")
    with pytest.raises(DataError, match=r"chat template refuses: 1\n +d.jsonl line 1: No system here\."):
        tokenize(tokenizer, [row], ["chat"], 100)
    tokenizer.chat_template = None
    with pytest.raises(TemplateError, match="has no chat template"):
        tokenize(tokenizer, [row], ["chat"], 100)


def test_an_answer_that_a_template_drops_leaves_nothing_to_predict() -> None:
    row = Row(prompt="p", completion=" ", truncated=True).set_origin("d.jsonl line 1")
    assert len(tokenize(tiny_tokenizer(), [row], ["plain"], 100)) == 1
    with pytest.raises(DataError, match=r"nothing to predict: 1\n +d.jsonl line 1: under 'chat'"):
        tokenize(tiny_tokenizer(), [row], ["chat"], 100)


def test_a_prompt_without_a_token_is_named_since_nothing_predicts_its_answer() -> None:
    row = Row.model_validate({"messages": [{"role": role, "content": text} for role, text in (("user", ""), ("assistant", "c"))]})
    assert len(tokenize(tiny_tokenizer(), [row], ["chat"], 100)) == 1
    with pytest.raises(DataError, match=r"empty prompt: 1\n +d.jsonl line 1: under 'plain'"):
        tokenize(tiny_tokenizer(), [row.set_origin("d.jsonl line 1")], ["plain"], 100)


@pytest.mark.parametrize(("length", "num_used"), [(9, 2), (20, 0), (50, 0)])
def test_a_row_that_is_too_long_under_one_template_is_left_out_whole_and_counted_once(length: int, num_used: int) -> None:
    """Regression: such a row was counted under each template, and learned under the other one although reported as left out."""
    answers = {"short": " c", "long": " " + "c" * length}
    rows = [Row(prompt="p", completion=text).set_origin(origin) for origin, text in answers.items()]
    pairs = [Row(prompt="p", chosen=" d", rejected=text).set_origin(origin) for origin, text in answers.items()]
    row_faults, pair_faults = Faults("skip"), Faults("skip")
    examples = tokenize(tiny_tokenizer(), rows, ["plain", "chat"], 40, faults=row_faults)
    rejected = [pair.rejected for pair in tokenize_pairs(tiny_tokenizer(), pairs, ["plain", "chat"], 40, pair_faults)]
    for encoded, faults in ((examples, row_faults), (rejected, pair_faults)):
        assert [example.origin for example in encoded] == ["short"] * 2 + ["long"] * num_used
        assert faults.counts == ({} if num_used else {"too long": 1})


def test_pairs_are_read_and_written_as_two_examples_after_one_prompt(tmp_path: Path) -> None:
    pair = {"prompt": "p", "chosen": " good", "rejected": " bad"}
    faults = Faults("skip")
    lines = [pair, GOOD, pair | {"rejected": " "}, pair | {"rejected": "x" * 50}]
    rows = read_rows(write(tmp_path / "d.jsonl", *lines), needs="preference", faults=faults)
    [encoded] = tokenize_pairs(tiny_tokenizer(), rows, ["plain"], 20, faults)
    assert tiny_tokenizer().decode(encoded.chosen.ids) == "p good<|end|>"
    assert tiny_tokenizer().decode(encoded.rejected.ids) == "p bad<|end|>"
    assert encoded.chosen.num_prompt == encoded.rejected.num_prompt == 1
    assert faults.counts == {"missing field": 1, "empty completion": 1, "too long": 1}
