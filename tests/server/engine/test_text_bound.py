"""Bounds on texts: too long a text is refused before all of it is tokenized, and no text that fits is refused."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from server.engine import text as text_module
from server.engine.text import TextBound, dropped_bytes, longest_token

CORPUS = ["the cat sat on the mat, and then it sat on the hat", "    deeply    indented\n\n\n\n", "aaaaaaaaaaaaaaaaaaaaaaaa"]


def trained(pre_tokenizer: pre_tokenizers.PreTokenizer | None = None) -> Tokenizer:
    """Return a byte-level tokenizer with merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


class Counting:
    """A tokenizer that counts the characters that it was given."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.num_characters = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)

    def encode_batch(self, texts: Sequence[str], **options: bool) -> object:
        self.num_characters += sum(map(len, texts))
        return self._tokenizer.encode_batch(list(texts), **options)


def test_the_longest_token_is_the_longest_of_the_vocabulary_in_bytes(tokenizer: PreTrainedTokenizerFast) -> None:
    assert longest_token(tokenizer.backend_tokenizer) == len("<|end|>")
    assert longest_token(trained()) == max(len(token) for token in trained().get_vocab())


def _normalizing(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Strip()


def _dropping_spaces(tokenizer: Tokenizer) -> None:
    split = pre_tokenizers.Split(" ", "removed")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _splitting_words(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()


def _swallowing(tokenizer: Tokenizer) -> None:
    tokenizer.add_tokens([AddedToken("<pad>", rstrip=True)])


def _bare(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = None


@pytest.mark.parametrize("spoil", [_normalizing, _dropping_spaces, _splitting_words, _swallowing, _bare])
def test_a_tokenizer_that_may_drop_bytes_has_no_longest_token(spoil: Callable[[Tokenizer], None]) -> None:
    tokenizer = trained()
    spoil(tokenizer)
    assert longest_token(tokenizer) is None
    assert TextBound(tokenizer, 10).fault(" " * 80) is None


def test_bytes_that_the_vocabulary_lacks_do_not_count() -> None:
    """SmolLM2's vocabulary lacks some control characters, so a text of only these has no tokens at all."""
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "Ġ": 1, "Ã": 2, "©": 3}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert set(range(256)) - {*dropped_bytes(tokenizer)} == {*"a é".encode()}
    bound = TextBound(tokenizer, 4)
    assert bound.fault("\n\x00b" * 10 + "a é") is None
    assert bound.fault("\n\x00b" * 10 + "aa é") == "has 5 bytes, which are more than 4 tokens hold"
    assert dropped_bytes(trained()) == b""


def test_a_pre_tokenizer_that_drops_no_bytes_has_a_longest_token() -> None:
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    assert longest_token(trained(pre_tokenizers.Sequence(parts))) is not None


def test_more_bytes_than_the_tokens_can_hold_are_refused_without_tokenizing() -> None:
    """Regression: 1 MiB of text was tokenized for 3 s, and only then refused as too long."""
    counting = Counting(trained())
    bound = TextBound(counting, 100)  # type: ignore[arg-type]
    assert bound.max_bytes
    assert bound.fault("é" * (bound.max_bytes // 2 + 1)) == (
        f"has {2 * (bound.max_bytes // 2 + 1)} bytes, which are more than 100 tokens hold"
    )
    assert counting.num_characters == 0
    assert bound.fault("a" * 24 * 20) is None


def test_a_text_with_too_many_tokens_is_tokenized_only_until_that_is_known() -> None:
    tokenizer = trained()
    _normalizing(tokenizer)
    counting = Counting(tokenizer)
    assert TextBound(counting, 100).fault("x. " * 10_000) == "has more than 100 tokens"  # type: ignore[arg-type]
    assert counting.num_characters == 500
    sparse = "a" * 24 * 4000
    counting.num_characters = 0
    assert TextBound(counting, 8000).fault(sparse + "x. " * 100_000) == "has more than 8000 tokens"  # type: ignore[arg-type]
    assert counting.num_characters < len(sparse) + 64_000


@given(st.text(st.sampled_from("at he\n.é<|end|>"), max_size=300), st.integers(1, 40))
def test_no_text_that_fits_is_refused(text: str, max_tokens: int) -> None:
    num_tokens = len(TOKENIZER.encode_batch([text], add_special_tokens=False)[0])
    if num_tokens <= max_tokens:
        assert TextBound(TOKENIZER, max_tokens).fault(text) is None


@given(st.text(st.sampled_from("at he\n.é"), max_size=400))
def test_no_text_that_fits_is_refused_however_it_is_cut(text: str) -> None:
    num_tokens = len(TOKENIZER.encode_batch([text], add_special_tokens=False)[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "MAX_PIECE", 8)
        assert TextBound(TOKENIZER, max(1, num_tokens)).fault(text) is None


TOKENIZER = trained()
