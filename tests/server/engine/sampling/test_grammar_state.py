"""Grammar state of a sequence: the tokens allowed next, as its output grows."""

import json
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from transformers import PreTrainedTokenizerFast

from lori.template import encode
from server.engine.grammar import Grammar
from server.engine.sampling import grammars as grammar_module
from server.engine.sampling.grammars import Grammars, GrammarState, bitmask
from tests.server.rig import EOS

SIZE = EOS + 1


@pytest.fixture(scope="module")
def grammars(tokenizer: PreTrainedTokenizerFast) -> Grammars:
    return Grammars(tokenizer.backend_tokenizer, SIZE, [EOS])


def tokens(packed: grammar_module.Bitmask) -> list[int]:
    return np.flatnonzero(np.unpackbits(packed.view(np.uint8), bitorder="little")).tolist()


def allowed(state: GrammarState, output_ids: list[int]) -> list[int]:
    state.follow(output_ids)
    return tokens(state.allowed)


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return encode(tokenizer, text).ids


def test_a_bitmask_has_the_bits_of_its_tokens() -> None:
    assert tokens(bitmask([0, 31, 32, 70], 70)) == [0, 31, 32]
    assert bitmask([], 33).shape == (2,)


def test_a_stop_token_is_allowed_where_the_grammar_may_end_and_alone_where_it_must(
    grammars: Grammars, tokenizer: PreTrainedTokenizerFast
) -> None:
    state = grammars.start(Grammar("regex", "ab?"))
    a, b = ids(tokenizer, "ab")
    assert allowed(state, []) == [a]
    assert not state.can_only_end
    assert allowed(state, [a]) == sorted([b, EOS])
    assert not state.can_only_end
    assert allowed(state, [a, b]) == [EOS]
    assert state.can_only_end
    assert not state.fault


def test_a_model_with_several_stop_tokens_may_end_with_any(tokenizer: PreTrainedTokenizerFast) -> None:
    spare = ids(tokenizer, "z")[0]
    state = Grammars(tokenizer.backend_tokenizer, SIZE, [EOS, spare]).start(Grammar("regex", "a"))
    a = ids(tokenizer, "a")[0]
    assert allowed(state, []) == [a]
    assert allowed(state, [a]) == sorted([spare, EOS])
    assert state.can_only_end


def test_logits_beyond_the_tokenizer_s_tokens_are_never_allowed(tokenizer: PreTrainedTokenizerFast) -> None:
    state = Grammars(tokenizer.backend_tokenizer, SIZE + 63, [EOS]).start(Grammar("regex", "(?s:.*)"))
    assert max(allowed(state, [])) == EOS
    assert state.allowed.shape == (10,)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from('{}[]",:ab1 -'), max_size=30), st.data())
def test_output_in_parts_gives_the_same_state_as_output_at_once(
    grammars: Grammars, tokenizer: PreTrainedTokenizerFast, text: str, data: st.DataObject
) -> None:
    """However the parts are cut, and however often the same output is repeated, as after a preemption."""
    whole, state = ids(tokenizer, text), grammars.start(Grammar("json_object"))
    output: list[int] = []
    for token in whole:
        if token not in allowed(state, output):
            break
        output.append(token)
    again, end = grammars.start(Grammar("json_object")), 0
    while end < len(output):
        end += data.draw(st.integers(0, len(output) - end))
        again.follow(output[:end])
        if data.draw(st.booleans()):
            end = min(end + 1, len(output))
    assert allowed(again, output) == allowed(state, output)


def test_output_against_the_grammar_is_a_fault_and_nothing_is_allowed_afterwards(
    grammars: Grammars, tokenizer: PreTrainedTokenizerFast
) -> None:
    state = grammars.start(Grammar("regex", "ab"))
    assert allowed(state, ids(tokenizer, "x")) == []
    assert "doesn't satisfy the grammar" in state.fault
    assert allowed(state, ids(tokenizer, "xy")) == []


def test_sequences_of_one_grammar_have_independent_states(grammars: Grammars, tokenizer: PreTrainedTokenizerFast) -> None:
    one, other = grammars.start(Grammar("regex", "aa|bc")), grammars.start(Grammar("regex", "aa|bc"))
    a, b, c = ids(tokenizer, "abc")
    assert allowed(one, [a]) == [a]
    assert allowed(other, [b]) == [c]
    assert allowed(grammars.start(Grammar("regex", "aa|bc")), []) == [a, b]


def test_a_grammar_that_grows_beyond_its_limits_is_a_fault(grammars: Grammars, tokenizer: PreTrainedTokenizerFast) -> None:
    state = grammars.start(Grammar("regex", "((a{1000}){1000}){1000}"))
    assert allowed(state, ids(tokenizer, "aaaa")) == []
    assert "too many expressions" in state.fault


class SlowMatcher:
    """A matcher that takes `seconds` of a fake clock for each mask, and allows all tokens."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self.now = seconds, 0.0
        self.num_masks = 0

    def consume_tokens(self, _: list[int]) -> bool:
        return True

    def unsafe_compute_mask_ptr(self, _: int, __: int) -> None:
        self.now += self._seconds
        self.num_masks += 1

    def is_error(self) -> bool:
        return False


@pytest.mark.parametrize(("seconds", "num_masks"), [(0.001, 400), (0.012, 11), (0.2, 1)])
def test_a_sequence_whose_masks_take_long_again_and_again_is_ended(
    monkeypatch: pytest.MonkeyPatch, seconds: float, num_masks: int
) -> None:
    matcher = SlowMatcher(seconds)
    monkeypatch.setattr(grammar_module.time, "thread_time", lambda: matcher.now)
    state = GrammarState(cast(LLMatcher, matcher), bitmask([EOS], SIZE))
    for length in range(400):
        state.follow([0] * length)
        state.follow([0] * length)  # a step that is tried again computes no mask
    assert matcher.num_masks == num_masks
    assert bool(state.fault) == (num_masks < 400)


def test_the_masks_of_a_usual_answer_take_little_of_their_time(grammars: Grammars, tokenizer: PreTrainedTokenizerFast) -> None:
    """Quick masks leave more time than there was at the start."""
    text = json.dumps({"name": "A" * 200, "tags": ["x", "y"] * 20, "age": 3})
    state = grammars.start(Grammar("json_object"))
    for end in range(len(ids(tokenizer, text)) + 1):
        state.follow(ids(tokenizer, text)[:end])
    assert not state.fault
    assert EOS in tokens(state.allowed)
    assert state._seconds > grammar_module.MASK_SECONDS
