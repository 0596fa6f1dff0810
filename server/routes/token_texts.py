"""Conversions between texts and tokens, for the routes. Call them off the event loop: long texts take a while.

The tokenizer is called with batches of one, because it releases Python's lock for batches only.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lori.template import Message, Template, render_prompt
from server.engine.generate_request import RefusedError
from server.engine.text import TextBound


def token_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[Message],
    bound: TextBound,
    template: Template | None,
    *,
    add_special_tokens: bool,
) -> list[int]:
    """Return the token ids of a text, or of messages under `template`, which adds special tokens of its own.

    Raises `TemplateError`, and `RefusedError` if the text has more tokens than `bound` allows.
    """
    is_text = isinstance(prompt, str)
    text = render_prompt(tokenizer, prompt, template or "plain")
    if fault := bound.fault(text):
        raise RefusedError("prompt" if is_text else "messages", f"{fault}, expected {bound.max_tokens} at most")
    [encoding] = tokenizer.backend_tokenizer.encode_batch([text], add_special_tokens=is_text and add_special_tokens)
    ids: list[int] = encoding.ids
    return ids


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Return the text of each token."""
    texts = {token: text_of(tokenizer, [token]) for token in set(ids)}
    return [texts[token] for token in ids]


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of tokens, with special tokens. Unknown token ids have no text."""
    [text] = tokenizer.backend_tokenizer.decode_batch([list(ids)], skip_special_tokens=False)
    assert isinstance(text, str)
    return text
