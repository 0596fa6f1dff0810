"""Decoding of prompt tokens that a client names: their text, and the offset of each token."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer

from lori.embedded import embedded_model
from server.engine.admission import decode_with_offsets
from server.engine.text import MAX_PENDING_TOKENS, REPLACEMENT_CHARACTER
from tests.tiny import tiny_tokenizer

NAMES = ["embedded", "tiny"]


@pytest.fixture(scope="module")
def backends() -> dict[str, Tokenizer]:
    """Return the tokenizers of the embedded model and of the tiny models."""
    return {
        "embedded": AutoTokenizer.from_pretrained(embedded_model()).backend_tokenizer,
        "tiny": tiny_tokenizer().backend_tokenizer,
    }


def special_ids(backend: Tokenizer) -> list[int]:
    return [token for token, added in backend.get_added_tokens_decoder().items() if added.special]


def tokens_of(backend: Tokenizer, max_size: int) -> st.SearchStrategy[list[int]]:
    """Return a strategy of any tokens, with extra halves of characters, special tokens, and tokens unknown to the tokenizer."""
    num_tokens = backend.get_vocab_size()
    halves = [token for token in range(num_tokens) if REPLACEMENT_CHARACTER in backend.decode([token])]
    kinds = [st.integers(0, num_tokens - 1), st.sampled_from(halves), st.sampled_from(special_ids(backend))]
    return st.lists(st.one_of(*kinds, st.integers(num_tokens, num_tokens + 50)), max_size=max_size)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_any_tokens_have_the_text_of_the_tokenizer_and_rising_offsets(backends: dict[str, Tokenizer], name: str) -> None:
    """The text is whole, even if it ends in half a character. Offsets lie inside the text, and never decrease."""
    backend = backends[name]

    @settings(max_examples=300, deadline=None)
    @given(tokens_of(backend, 90))
    def check(ids: list[int]) -> None:
        text, offsets = decode_with_offsets(backend, ids)
        assert text == backend.decode(ids, skip_special_tokens=True)
        assert len(offsets) == len(ids)
        assert [*offsets] == sorted(offsets)
        assert all(0 <= offset <= len(text) for offset in offsets)
        assert offsets[:1] in ((), (0,))
        # A token adds no text before its own offset, except for bytes that may still become a character.
        for place, offset in enumerate(offsets):
            before = backend.decode(ids[:place], skip_special_tokens=True)
            assert before[:offset] == text[:offset]
            assert not before[offset:].strip(REPLACEMENT_CHARACTER)
            assert len(before) - offset <= MAX_PENDING_TOKENS

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters=REPLACEMENT_CHARACTER), max_size=40))
def test_the_tokens_of_a_text_have_that_text_and_the_offsets_of_its_encoding(
    backends: dict[str, Tokenizer], name: str, text: str
) -> None:
    encoding = backends[name].encode(text, add_special_tokens=False)
    assume(backends[name].decode(encoding.ids) == text)  # the embedded tokenizer lacks some bytes
    assert decode_with_offsets(backends[name], encoding.ids) == (text, tuple(start for start, _ in encoding.offsets))


@pytest.mark.parametrize("name", NAMES)
def test_whole_tokens_split_the_text_and_special_tokens_have_none(backends: dict[str, Tokenizer], name: str) -> None:
    backend = backends[name]
    special = special_ids(backend)
    whole = [token for token in range(backend.get_vocab_size()) if REPLACEMENT_CHARACTER not in backend.decode([token])]

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.sampled_from(whole) | st.sampled_from(special), min_size=1, max_size=40))
    def check(ids: list[int]) -> None:
        text, offsets = decode_with_offsets(backend, ids)
        ends = (*offsets[1:], len(text))
        pieces = [text[start:end] for start, end in zip(offsets, ends, strict=True)]
        assert pieces == ["" if token in special else backend.decode([token]) for token in ids]

    check()


@pytest.mark.parametrize(
    ("ids", "text", "offsets"),
    [
        pytest.param([], "", (), id="nothing"),
        pytest.param("aé€😀b", "aé€😀b", (0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4), id="characters of several tokens"),
        pytest.param(["a", "é", -1], "a\ufffd", (0, 1), id="half a character at the end"),
        pytest.param(["a", "<|end|>", "b"], "ab", (0, 1, 1), id="a special token"),
        pytest.param(["<|end|>"], "", (0,), id="a special token alone"),
        pytest.param(["a", 900, "b"], "ab", (0, 1, 1), id="a token that the tokenizer does not know"),
    ],
)
def test_examples_of_tokens_have_their_text_and_offsets(
    backends: dict[str, Tokenizer], ids: str | list[str | int], text: str, offsets: tuple[int, ...]
) -> None:
    tokens: list[int] = []
    for part in ids if isinstance(ids, list) else [ids]:
        if part == -1:
            tokens.pop()
        else:
            tokens += backends["tiny"].encode(part).ids if isinstance(part, str) else [part]
    assert decode_with_offsets(backends["tiny"], tokens) == (text, offsets)


def test_a_tokenizer_whose_earlier_text_changes_with_later_tokens_is_no_error() -> None:
    """This one decodes a run of bytes as a whole or not at all, so later bytes can change text that seemed final."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)} | {"a": 257}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    newline, half = vocab["<0x0A>"], vocab["<0xE2>"]

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.sampled_from([newline, half, vocab["<0x82>"], vocab["<0xAC>"], 257]), max_size=20))
    def check(ids: list[int]) -> None:
        text, offsets = decode_with_offsets(backend, ids)
        assert text.count("a") == ids.count(257)
        assert len(offsets) == len(ids)
        assert [*offsets] == sorted(offsets)
        assert all(offset <= len(text) for offset in offsets)

    check()
    assert decode_with_offsets(backend, [257, newline, 257]) == ("a\na", (0, 1, 2))
