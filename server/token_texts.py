"""Texts to tokens and back, as routes that generate read them. Called off the event loop: long texts take a while.

In batches of one: a tokenizer lets other threads run meanwhile, which it does not with what is no batch.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lori.template import Message, encode, render_prompt


def token_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Message], *, add_special_tokens: bool) -> list[int]:
    """Returns the tokens of a text, or of messages under the chat template, which has its own special ones.

    Raises `TemplateError`.
    """
    if not isinstance(prompt, str):
        return encode(tokenizer, render_prompt(tokenizer, prompt, "chat")).ids
    [encoding] = tokenizer.backend_tokenizer.encode_batch([prompt], add_special_tokens=add_special_tokens)
    ids: list[int] = encoding.ids
    return ids


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Returns the text of each token."""
    texts = {token: text_of(tokenizer, [token]) for token in set(ids)}
    return [texts[token] for token in ids]


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Returns the text of tokens, special ones too; those that the tokenizer does not know have none."""
    [text] = tokenizer.backend_tokenizer.decode_batch([list(ids)], skip_special_tokens=False)
    assert isinstance(text, str)
    return text
