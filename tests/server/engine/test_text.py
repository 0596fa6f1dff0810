"""Text stream: tokens are decoded as they come, never to half a character and never past a stop string."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lori.embedded import embedded_model
from lori.template import encode
from server.engine.text import MAX_PENDING_TOKENS, NUM_CONTEXT, REPLACEMENT_CHARACTER, TextStream
from tests.tiny import tiny_tokenizer


def pieces(
    tokenizer: PreTrainedTokenizerFast, text: str, stops: tuple[str, ...] = (), prompt: str = "Say: "
) -> tuple[list[str], TextStream]:
    """Push the tokens of `text` until a stop, then flush. Return the text of each push and of the flush, and the stream."""
    stream = TextStream(tokenizer.backend_tokenizer, tuple(encode(tokenizer, prompt).ids), stops)
    out = []
    for token in encode(tokenizer, text).ids:
        out.append(stream.push(token))
        if stream.is_stopped:
            break
    return [*out, stream.flush()], stream


def test_a_character_of_several_tokens_is_emitted_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    out, stream = pieces(tokenizer, "aé€😀b")
    assert out == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]
    assert stream.num_characters == 5


def test_half_a_character_at_the_end_is_not_emitted(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = TextStream(tokenizer.backend_tokenizer, tuple(encode(tokenizer, "x").ids), ())
    tokens = encode(tokenizer, "ab€").ids[:-1]
    assert "".join([*map(stream.push, tokens), stream.flush()]) == "ab"


def test_bytes_that_are_no_character_do_not_end_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    lone = encode(tokenizer, "€").ids[1]
    stream = TextStream(tokenizer.backend_tokenizer, tuple(encode(tokenizer, "x").ids), ())
    assert "".join(map(stream.push, [*encode(tokenizer, "a").ids, lone, *encode(tokenizer, "bc").ids])) == "a\ufffdbc"


def test_special_tokens_are_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    out, _ = pieces(tokenizer, "a<|end|>b")
    assert "".join(out) == "ab"


@pytest.mark.parametrize("prompt", ["", "é", "ends with a space ", "ends in the replacement character \ufffd"])
def test_the_prompt_is_never_part_of_the_text(tokenizer: PreTrainedTokenizerFast, prompt: str) -> None:
    out, stream = pieces(tokenizer, "answer", prompt=prompt)
    assert out == [*"answer", ""]
    assert stream.num_characters == 6


def byte_fallback_tokenizer() -> Tokenizer:
    """Return a tokenizer like those of Llama 2, Mistral and Gemma: a character without a token, such as a newline, is bytes."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    vocab |= {character: len(vocab) + place for place, character in enumerate("▁abcxyz")}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("has_byte_fallback", [False, True])
def test_any_text_after_any_prompt_is_emitted_as_it_is(
    tokenizer: PreTrainedTokenizerFast, has_byte_fallback: bool, seed: int
) -> None:
    """This includes prompts whose decoded context would begin in the middle of a character."""
    backend = byte_fallback_tokenizer() if has_byte_fallback else tokenizer.backend_tokenizer
    rng = random.Random(seed)
    prompt, text = ("".join(rng.choices("ab€😀é\ufffd c", k=rng.randint(1, 14))) for _ in range(2))
    stream = TextStream(backend, tuple(backend.encode(prompt).ids), ())
    pieces_of_text = [stream.push(token) for token in backend.encode(text + "a").ids]
    assert "".join(pieces_of_text) == text + "a"
    assert stream.num_characters == len(text) + 1


def test_byte_tokens_of_half_a_character_after_a_whole_one_are_no_error() -> None:
    """Regression: the tokens of a newline, half a character and a letter, which sampling can give, ended the engine."""
    tokenizer = byte_fallback_tokenizer()
    stream = TextStream(tokenizer, tuple(tokenizer.encode("abc").ids), ())
    text = "".join(stream.push(tokenizer.token_to_id(token)) for token in ("a", "<0x0A>", "<0xE2>", "x", "y"))
    assert text.startswith("a\n")
    assert text.endswith("xy")


@pytest.fixture(scope="session")
def backends() -> dict[str, Tokenizer]:
    """Return the tokenizers of the embedded model and of the tiny models."""
    return {
        "embedded": AutoTokenizer.from_pretrained(embedded_model()).backend_tokenizer,
        "tiny": tiny_tokenizer().backend_tokenizer,
    }


def tokens_of(backend: Tokenizer, max_size: int) -> st.SearchStrategy[list[int]]:
    """Return a strategy of any tokens, with extra special tokens and halves of characters."""
    special = [token for token, added in backend.get_added_tokens_decoder().items() if added.special]
    num_tokens = backend.get_vocab_size()
    halves = [token for token in range(num_tokens) if backend.decode([token]).endswith(REPLACEMENT_CHARACTER)]
    kinds = [st.integers(0, num_tokens - 1), st.sampled_from(halves), st.sampled_from(halves), st.sampled_from(special)]
    return st.lists(st.one_of(*kinds), max_size=max_size)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["embedded", "tiny"])
def test_the_pieces_of_any_tokens_add_up_to_their_text(backends: dict[str, Tokenizer], name: str) -> None:
    """Except for bytes that may still become a character, for any prompt. Special tokens inside a character change nothing."""
    backend = backends[name]

    @settings(max_examples=300, deadline=None)
    @given(st.text(max_size=12), tokens_of(backend, 60))
    def check(prompt: str, tokens: list[int]) -> None:
        stream, out = TextStream(backend, tuple(backend.encode(prompt).ids), ()), ""
        for token in tokens:
            out += stream.push(token)
        text = backend.decode(tokens, skip_special_tokens=True)
        assert text.startswith(out)
        assert not text[len(out) :].strip(REPLACEMENT_CHARACTER)
        assert len(text) - len(out) <= MAX_PENDING_TOKENS
        assert stream.num_characters == len(out)

    check()


@pytest.mark.parametrize("name", ["embedded", "tiny"])
@pytest.mark.parametrize("share_special", [0.0, 0.5, 0.95])
def test_the_pieces_of_thousands_of_halves_and_special_tokens_add_up_to_their_text(
    backends: dict[str, Tokenizer], name: str, share_special: float
) -> None:
    """There are so many that the first of them are dropped before a character is complete."""
    backend, rng = backends[name], random.Random(1)
    special = [token for token, added in backend.get_added_tokens_decoder().items() if added.special]
    halves = [backend.encode(character).ids for character in ("é", "€", "😀")]
    starts, rest = [ids[0] for ids in halves], [ids[1] for ids in halves if len(ids) > 1]
    tokens = [rng.choice(special if rng.random() < share_special else rng.choice([starts, rest])) for _ in range(5000)]
    stream = TextStream(backend, (), ())
    out = "".join(map(stream.push, tokens))
    text = backend.decode(tokens, skip_special_tokens=True)
    assert text.startswith(out)
    assert len(text) - len(out) <= MAX_PENDING_TOKENS


def test_text_before_half_a_character_in_one_token_is_emitted_at_once(backends: dict[str, Tokenizer]) -> None:
    backend = backends["embedded"]
    texts = {token: backend.decode([token]) for token in range(backend.get_vocab_size())}
    token = next(
        t
        for t, text in texts.items()
        if len(text) > 1 and text.endswith(REPLACEMENT_CHARACTER) and text[0] != REPLACEMENT_CHARACTER
    )
    assert TextStream(backend, (), ()).push(token) == texts[token].rstrip(REPLACEMENT_CHARACTER)


class CountingTokenizer:
    """A tokenizer that counts the tokens that it decodes."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend, self.num_decoded = backend, 0

    def get_added_tokens_decoder(self) -> dict[int, object]:
        return self._backend.get_added_tokens_decoder()

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        self.num_decoded += len(ids)
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("text", ["€", "<|end|>", "a", "😀"])
@pytest.mark.parametrize("place", [0, -1])
def test_a_long_answer_costs_as_much_per_token_as_a_short_one(tokenizer: PreTrainedTokenizerFast, text: str, place: int) -> None:
    """This includes tokens that never form a character."""
    counting, num_tokens = CountingTokenizer(tokenizer.backend_tokenizer), 10_000
    token = encode(tokenizer, text).ids[place]
    stream = TextStream(counting, tuple(encode(tokenizer, "x").ids), ())
    out = "".join(stream.push(token) for _ in range(num_tokens))
    expected = tokenizer.decode([token] * num_tokens, skip_special_tokens=True)
    assert expected.startswith(out)
    assert len(expected) - len(out) <= MAX_PENDING_TOKENS
    assert counting.num_decoded <= (2 * NUM_CONTEXT + MAX_PENDING_TOKENS) * num_tokens


def test_a_stop_string_is_found_across_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    out, stream = pieces(tokenizer, "one ENDtwo", ("END",))
    assert out == ["o", "n", "e", " ", "", "", "", ""]
    assert stream.is_stopped


def test_text_that_only_began_like_a_stop_is_emitted_as_soon_as_it_is_none(tokenizer: PreTrainedTokenizerFast) -> None:
    out, stream = pieces(tokenizer, "an ENDgame", ("ENDING",))
    assert out == ["a", "n", " ", "", "", "", "ENDg", "a", "m", "e", ""]
    assert not stream.is_stopped


def test_text_held_back_at_the_end_is_flushed_once(tokenizer: PreTrainedTokenizerFast) -> None:
    out, stream = pieces(tokenizer, "the EN", ("END",))
    assert out == ["t", "h", "e", " ", "", "", "EN"]
    assert stream.flush() == ""
    assert stream.num_characters == 6


def test_nothing_of_a_stop_or_after_it_is_flushed(tokenizer: PreTrainedTokenizerFast) -> None:
    out, stream = pieces(tokenizer, "aENDbENDc", ("END",))
    assert "".join(out) == "a"
    assert stream.flush() == ""


def test_a_stop_of_several_bytes_a_character_is_found(tokenizer: PreTrainedTokenizerFast) -> None:
    out, stream = pieces(tokenizer, "aé€ü😀z", ("€ü",))
    assert "".join(out) == "aé"
    assert stream.is_stopped


def test_of_two_stops_that_end_together_the_one_that_begins_first_cuts(tokenizer: PreTrainedTokenizerFast) -> None:
    out, _ = pieces(tokenizer, "xxabc", ("c", "abc"))
    assert "".join(out) == "xx"


@pytest.mark.parametrize("seed", range(60))
def test_any_text_is_cut_where_its_first_stop_begins(tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choices("ab€", k=40))
    stops = tuple("".join(rng.choices("ab€", k=rng.randint(2, 7))) for _ in range(rng.randint(0, 3)))
    # The text as it grows, up to the first character that completes a stop.
    grown = next((text[:n] for n in range(len(text) + 1) if any(stop in text[:n] for stop in stops)), None)
    expected = text if grown is None else grown[: min(grown.find(stop) for stop in stops if stop in grown)]
    out, stream = pieces(tokenizer, text, stops)
    assert "".join(out) == expected
    assert stream.is_stopped == (grown is not None)


def test_a_stop_string_does_not_count_before_min_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = encode(tokenizer, "aENDbENDcENDd").ids
    for min_tokens, expected in ((0, "a"), (4, "a"), (5, "aENDb"), (8, "aENDb"), (9, "aENDbENDc"), (13, "aENDbENDcENDd")):
        stream, out = TextStream(tokenizer.backend_tokenizer, (), ("END",), min_tokens), ""
        for token in tokens:
            out += stream.push(token)
            if stream.is_stopped:
                break
        assert out + stream.flush() == expected


def test_special_tokens_count_for_min_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = TextStream(tokenizer.backend_tokenizer, (), ("b",), 3)
    out = [stream.push(token) for token in encode(tokenizer, "a<|end|>b").ids]
    assert out == ["a", "", ""]
    assert stream.is_stopped
