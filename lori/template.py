"""How a prompt is written: one function for training, evaluation and serving, so that they cannot differ.

`chat` is the base model's own chat template; `plain` is the text as it stands.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, cast, get_args

from jinja2 import TemplateError as JinjaError
from pydantic import AfterValidator, BaseModel, ConfigDict

from lori.errors import TemplateError

if TYPE_CHECKING:  # what reads adapters alone need not wait for transformers
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

Template = Literal["chat", "plain"]


def _is_text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"holds half of a surrogate pair at character {error.start}, expected Unicode text") from error
    return value


Text = Annotated[str, AfterValidator(_is_text)]
"""Text that a tokenizer can read: JSON can hold half a surrogate pair, UTF-8 cannot."""


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: Text


def common_template(learnt: Sequence[tuple[str, Sequence[Template]]]) -> Template:
    """Return the template in which messages are written for adapters: the name of each, and the templates it was trained on.

    `chat`, the base's own, where all of them know it, and `plain` where they have only that in common. Raises `TemplateError`
    where they have none.
    """
    for template in get_args(Template):
        if all(template in templates for _, templates in learnt):
            return cast(Template, template)
    found = "; ".join(f"{name}: {', '.join(templates)}" for name, templates in learnt)
    raise TemplateError(f"these adapters were trained on no common template ({found})")


def render_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str | Sequence[Message], template: Template) -> str:
    """Return the text that the model continues.

    A string is one user's message under `chat`, and stands as it is under `plain`; messages under `plain` are joined by
    newlines. Raises `TemplateError` where the chat template refuses the messages or the tokenizer has none.
    """
    if template == "plain":
        return prompt if isinstance(prompt, str) else "\n".join(message.content for message in prompt)
    if not tokenizer.chat_template:
        raise TemplateError("the base model's tokenizer has no chat template; use the template 'plain'")
    messages = [Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt
    try:
        text = tokenizer.apply_chat_template(
            [message.model_dump() for message in messages], tokenize=False, add_generation_prompt=True
        )
    except (JinjaError, TypeError, ValueError, ArithmeticError) as error:
        raise TemplateError(f"the chat template refuses these messages: {error}") from error
    assert isinstance(text, str)
    return text


def render_completion(prompt: str, completion: str, template: Template) -> str:
    """Return the completion as it follows the rendered `prompt` in training.

    The chat template ends in a newline, so leading space goes. A plain prompt that ends in no space, with a completion that
    begins with none, would run two words into one: a newline parts them.
    """
    if template == "chat":
        return completion.lstrip()
    glued = prompt and completion and not prompt[-1].isspace() and not completion[0].isspace()
    return "\n" + completion if glued else completion


def encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> "Encoding":
    """Return the token ids and offsets of rendered `text`: no token is added, since a template writes its own."""
    # As a batch of one: meanwhile other threads may run, which `encode` does not let them, for seconds where a text is long.
    encodings: list[Encoding] = tokenizer.backend_tokenizer.encode_batch([text], add_special_tokens=False)
    return encodings[0]
