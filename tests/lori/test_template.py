"""Templates: the text of a prompt and of its completion."""

import threading
import time

import pytest
from pydantic import ValidationError
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lori.errors import TemplateError
from lori.template import Message, encode, render_completion, render_prompt
from tests.tiny import tiny_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a new tokenizer, whose template the test may change."""
    return tiny_tokenizer()


CONVERSATION = [
    Message(role="system", content="Be brief."),
    Message(role="user", content="Hi {{ there }}"),
    Message(role="assistant", content="Yes?"),
    Message(role="user", content="Bye "),
]


def test_messages_under_chat_are_the_tokenizer_s_own_template(tokenizer: PreTrainedTokenizerFast) -> None:
    assert render_prompt(tokenizer, CONVERSATION, "chat") == (
        "<|system|>Be brief.<|end|><|user|>Hi {{ there }}<|end|><|assistant|>Yes?<|end|><|user|>Bye <|end|><|assistant|>"
    )  # fmt: skip


def test_a_string_under_chat_is_one_user_s_message(tokenizer: PreTrainedTokenizerFast) -> None:
    assert render_prompt(tokenizer, " Hi", "chat") == "<|user|> Hi<|end|><|assistant|>"
    assert render_prompt(tokenizer, " Hi", "chat") == render_prompt(tokenizer, [Message(role="user", content=" Hi")], "chat")


def test_a_string_under_plain_is_unchanged(tokenizer: PreTrainedTokenizerFast) -> None:
    assert render_prompt(tokenizer, " {{ x }}\n", "plain") == " {{ x }}\n"
    assert render_prompt(tokenizer, "", "plain") == ""


def test_messages_under_plain_are_lines(tokenizer: PreTrainedTokenizerFast) -> None:
    assert render_prompt(tokenizer, CONVERSATION, "plain") == "Be brief.\nHi {{ there }}\nYes?\nBye "


@pytest.mark.parametrize("none", [None, ""])
def test_a_tokenizer_without_a_template_supports_plain_only(tokenizer: PreTrainedTokenizerFast, none: str | None) -> None:
    tokenizer.chat_template = none
    with pytest.raises(TemplateError, match="has no chat template; use the template 'plain'"):
        render_prompt(tokenizer, "Hi", "chat")
    assert render_prompt(tokenizer, "Hi", "plain") == "Hi"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system message, please') }}", "no system message, please"),
        ("{{ messages[9]['role'] }}", "no element 9"),
        ("{% if %}", "end of statement block"),
        # Regression: a TypeError was raised, so the client's mistake was answered with a 500.
        ("{{ messages[0]['content'] + 1 }}", "str"),
    ],
    ids=["refuses", "undefined", "syntax", "type"],
)
def test_a_template_that_raises_is_a_template_error(tokenizer: PreTrainedTokenizerFast, template: str, reason: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(TemplateError, match=f"^the chat template refuses these messages: .*{reason}"):
        render_prompt(tokenizer, "Hi", "chat")


def test_a_conversation_of_no_messages_is_a_template_error(tokenizer: PreTrainedTokenizerFast) -> None:
    # Regression: transformers' ValueError was raised.
    with pytest.raises(TemplateError):
        render_prompt(tokenizer, [], "chat")


@pytest.mark.parametrize(
    "fields", [{"role": "tool", "content": "x"}, {"role": "user"}, {"role": "user", "content": "x", "name": "y"}]
)
def test_an_invalid_message_is_refused(fields: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        Message.model_validate(fields)


def test_half_a_surrogate_pair_is_no_text() -> None:
    # JSON can hold one. Regression: the tokenizer raised a TypeError.
    with pytest.raises(ValidationError, match="half of a surrogate pair at character 2"):
        Message.model_validate({"role": "user", "content": "Hi\ud83d"})
    assert Message(role="user", content="Hi\U0001f600").content == "Hi\U0001f600"


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("Is it so?", "yes", "\nyes"),
        ("Is it so?", " yes", " yes"),
        ("Is it so? ", "yes", "yes"),
        ("Is it so?\n", "yes", "yes"),
        ("Is it so?\t", " yes", " yes"),
        ("Is it so?", "\nyes", "\nyes"),
        ("", "yes", "yes"),
        ("Is it so?", "", ""),
        ("Is it so?", "yes \n", "\nyes \n"),
    ],
)
def test_a_plain_completion_is_separated_from_its_prompt(prompt: str, completion: str, expected: str) -> None:
    assert render_completion(prompt, completion, "plain") == expected


@pytest.mark.parametrize(
    ("completion", "expected"), [("yes", "yes"), (" yes", "yes"), ("\n\tyes \n", "yes \n"), ("", ""), (" ", "")]
)
def test_a_chat_completion_has_no_leading_space(completion: str, expected: str) -> None:
    assert render_completion("<|assistant|>", completion, "chat") == expected


def test_encode_adds_no_token(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode(tokenizer, "Hé <|end|>").ids
    assert len(ids) == len("Hé ".encode()) + 1  # one for each byte, and one for the special token in the text
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids) == "Hé <|end|>"
    assert encode(tokenizer, "").ids == []


def test_encode_gives_each_tokens_position_in_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode(tokenizer, "Hé<|end|>").offsets == [(0, 1), (1, 2), (1, 2), (2, 9)]


def test_encode_adds_no_token_even_if_the_tokenizer_would(tokenizer: PreTrainedTokenizerFast) -> None:
    end = ("<|end|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[end])
    assert len(tokenizer("Hi").input_ids) == 3
    assert len(encode(tokenizer, "Hi").ids) == 2


def test_other_threads_run_while_a_long_text_is_encoded(tokenizer: PreTrainedTokenizerFast) -> None:
    """Regression: encoding blocked all other threads, so a prompt of a megabyte stopped the server for seconds."""
    took = list[float]()

    def encode_long() -> None:
        began = time.monotonic()
        assert len(encode(tokenizer, "a" * 400_000)) == 400_000
        took.append(time.monotonic() - began)

    thread = threading.Thread(target=encode_long)
    before = time.thread_time()
    thread.start()
    while not took:
        pass
    own_seconds = time.thread_time() - before
    thread.join()
    assert own_seconds > took[0] / 20, "this thread ran for less than a twentieth of the encoding"
