"""Rendering of prompts: one function for training, evaluation and serving, so that their prompts cannot differ.

`chat` is the base model's own chat template; `plain` is the text as it stands.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, cast, get_args

from jinja2 import TemplateError as JinjaError
from pydantic import AfterValidator, BaseModel, ConfigDict

from lori.errors import TemplateError

if TYPE_CHECKING:  # programs that only read adapters need not wait for the import of transformers
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

Template = Literal["chat", "plain"]


def _check_text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"holds half of a surrogate pair at character {error.start}, expected Unicode text") from error
    return value


Text = Annotated[str, AfterValidator(_check_text)]
"""Text that UTF-8 can encode. JSON can hold half a surrogate pair, which a tokenizer cannot read."""


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: Text


def common_template(trained_on: Sequence[tuple[str, Sequence[Template]]]) -> Template:
    """Return the template for messages to several adapters. `trained_on` holds each adapter's name and its templates.

    This is `chat` if all adapters were trained on it, else `plain` if all were trained on that. Raises `TemplateError` if the
    adapters have no template in common.
    """
    for template in get_args(Template):
        if all(template in templates for _, templates in trained_on):
            return cast(Template, template)
    listing = "; ".join(f"{name}: {', '.join(templates)}" for name, templates in trained_on)
    raise TemplateError(f"these adapters were trained on no common template ({listing})")


def common_templates(trained_on: Sequence[tuple[str, Sequence[Template]]]) -> list[Template]:
    """Return the templates that all adapters were trained on, in the first one's order of preference. See `common_template`."""
    common_template(trained_on)  # raises if there is none
    first, *others = (templates for _, templates in trained_on)
    return [template for template in first if all(template in templates for templates in others)]


def render_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str | Sequence[Message], template: Template) -> str:
    """Return the text that the model continues.

    With `chat`, a string becomes one user message. With `plain`, a string stays as it is and messages are joined by newlines.
    Raises `TemplateError` if the chat template refuses the messages or the tokenizer has no chat template.
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

    With `chat`, leading white space is removed, since the template ends in a newline. With `plain`, a newline is inserted if
    neither the prompt's end nor the completion's start is white space: two words would run together otherwise.
    """
    if template == "chat":
        return completion.lstrip()
    needs_newline = prompt and completion and not prompt[-1].isspace() and not completion[0].isspace()
    return "\n" + completion if needs_newline else completion


def encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> "Encoding":
    """Return the token ids and offsets of rendered `text`. Adds no special tokens, since a template writes its own."""
    # `encode_batch` releases the GIL, `encode` does not: a long text would block other threads for seconds.
    encodings: list[Encoding] = tokenizer.backend_tokenizer.encode_batch([text], add_special_tokens=False)
    return encodings[0]
