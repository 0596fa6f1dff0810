"""Trials of grammars in a process of their own: a hostile grammar ends that process and nothing else."""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from server.engine.grammar import Grammar, GrammarError, GrammarKind
from server.engine.sampling import grammars as grammars_module
from server.engine.sampling.grammars import TRIAL_SECONDS, Grammars, GrammarTrials
from tests.server.rig import EOS


@pytest.fixture(scope="module")
def grammars(tokenizer: PreTrainedTokenizerFast) -> Grammars:
    return Grammars(tokenizer.backend_tokenizer, EOS + 1, [EOS])


@pytest.fixture
def trials(tokenizer: PreTrainedTokenizerFast) -> GrammarTrials:
    tokens = {"tokenizer": tokenizer.backend_tokenizer.to_str(), "num_tokens": EOS + 1, "stop_ids": [EOS]}
    return GrammarTrials(tokens, TRIAL_SECONDS)


def exponential(place: int) -> str:
    return f"(a|b)*{'ab'[place % 2]}(a|b){{{place + 5}}}"


HOSTILE = {
    "endless intersection": ("lark", "start: A\nA: " + " & ".join(f"/{exponential(i)}/" for i in range(20))),
    "large remainders": ("json_schema", '{"allOf": [{"type": "integer", "multipleOf": 1000003}]}'),
    "product of remainders": (
        "json_schema",
        json.dumps({"allOf": [{"type": "integer", "multipleOf": p} for p in (9973, 9967, 9949)]}),
    ),
    "repeated repetition": ("regex", "((a{1000}){1000}){1000}"),
    "many ways to repeat": ("lark", 'start: "a"{50000}'),
    "reference to itself": ("json_schema", '{"$ref": "#"}'),
    "reference to itself by another": (
        "json_schema",
        '{"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}',
    ),
    "reference to itself in a choice": ("json_schema", '{"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}'),
    "a rule that is itself": ("lark", "start: start"),
    "no character": ("regex", r"[^\s\S]"),
    "many choices at once": (
        "json_schema",
        json.dumps({"allOf": [{"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in range(4)]} for i in range(12)]}),
    ),
    "long alternatives": ("regex", "a?" * 5000 + "a" * 5000),
}
FINE = {
    "long": ("json_schema", json.dumps({"enum": ["x" * 60_000]})),
    "wide": ("json_schema", json.dumps({"type": "object", "properties": {f"property_{i}": {} for i in range(300)}})),
    "many": ("json_schema", json.dumps({"enum": [f"value {i} of many" for i in range(2000)]})),
    "deep": ("json_schema", '{"type": "array", "items":' * 100 + '{"type": "string"}' + "}" * 100),
    "recursive": ("json_schema", '{"type": "object", "properties": {"next": {"$ref": "#"}}}'),
    "endless": ("json_schema", '{"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}'),
    "enormous bounds": (
        "json_schema",
        '{"type": "array", "items": {"type": "string", "maxLength": 100000000}, "minItems": 100000000}',
    ),
    "exponential": ("regex", "(a|b)*a(a|b){500}"),
    "nested stars": ("regex", "(((a*)*)*)*b"),
    "nothing": ("regex", ""),
    "ambiguous": ("lark", 'start: start start | "a" | ""'),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused(grammars: Grammars, name: str) -> None:
    kind, text = HOSTILE[name]
    with pytest.raises(GrammarError) as caught:
        grammars.check(Grammar(kind, text))
    assert str(caught.value)
    grammars.check(Grammar("regex", "ab"))  # The next grammar is accepted.


@pytest.mark.parametrize("name", FINE)
def test_a_grammar_that_is_only_large_or_endless_is_accepted(grammars: Grammars, name: str) -> None:
    kind, text = FINE[name]
    grammars.check(Grammar(kind, text))
    state = grammars.start(Grammar(kind, text))
    state.follow([])
    assert state.allowed.any()


@pytest.mark.slow
def test_a_grammar_that_takes_too_long_is_refused_with_the_limit(grammars: Grammars) -> None:
    slow = Grammar(*HOSTILE["large remainders"])
    assert not grammars.check_quickly(slow)
    with pytest.raises(GrammarError, match=r"more than 0\.5 s"):
        grammars.check(slow)
    assert grammars.check_quickly(Grammar("regex", "a"))


@pytest.mark.slow
def test_a_grammar_that_ran_out_of_time_does_not_harm_the_next(trials: GrammarTrials) -> None:
    assert trials.fault(Grammar(*HOSTILE["large remainders"])) is None
    assert trials.fault(Grammar("regex", "a")) == ""


def test_slow_grammars_have_a_process_of_their_own(grammars: Grammars) -> None:
    assert grammars.check_quickly(Grammar("regex", "own"))
    with grammars._slow._lock:  # as while a slow grammar is tried
        assert grammars.check_quickly(Grammar("regex", "another"))


def test_a_grammar_is_tried_once(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Grammar] = []
    monkeypatch.setattr(grammars._slow, "fault", lambda grammar: tried.append(grammar) or "")
    for kind, text in [("regex", "once"), ("regex", "twice"), ("regex", "once"), ("lark", "once"), ("regex", "once")]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(grammars, "_compile", lambda grammar: grammar)
            grammars.check(Grammar(kind, text))  # type: ignore[arg-type]
    assert [(grammar.kind, grammar.text) for grammar in tried] == [("regex", "once"), ("regex", "twice"), ("lark", "once")]


def test_the_most_recently_used_grammars_are_cached(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars_module, "MAX_COMPILED", 3)
    monkeypatch.setattr(grammars_module, "MAX_COMPILED_CHARACTERS", 20)
    grammars = Grammars(tokenizer.backend_tokenizer, EOS + 1, [EOS])
    for text in ("a", "b", "c"):
        grammars.check(Grammar("regex", text))
    grammars.start(Grammar("regex", "a"))
    grammars.check(Grammar("regex", "d"))
    assert [one.text for one in grammars._compiled] == ["c", "a", "d"]
    grammars.check(Grammar("regex", "e" * 19))
    assert [one.text for one in grammars._compiled] == ["d", "e" * 19]
    grammars.check(Grammar("regex", "f" * 21))
    assert not grammars._compiled
    state = grammars.start(Grammar("regex", "f" * 21))  # compiled again
    state.follow([])
    assert state.allowed.any()


def test_a_process_that_has_died_is_started_again(trials: GrammarTrials) -> None:
    assert trials.fault(Grammar("regex", "a")) == ""
    assert trials._process
    trials._process.kill()
    trials._process.wait()
    with pytest.raises(ChildProcessError):
        trials.fault(Grammar("regex", "a"))
    assert trials.fault(Grammar("regex", "(a")) != ""


def test_the_process_ends_with_its_trials(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = {"tokenizer": tokenizer.backend_tokenizer.to_str(), "num_tokens": EOS + 1, "stop_ids": [EOS]}
    trials = GrammarTrials(tokens, TRIAL_SECONDS)
    trials.fault(Grammar("regex", "a"))
    process = trials._process
    assert process
    assert process.poll() is None
    del trials
    assert process.poll() is not None


def test_all_kinds_of_grammars_are_accepted(grammars: Grammars) -> None:
    kinds: list[tuple[GrammarKind, str]] = [("json_object", ""), ("json_schema", "{}"), ("regex", "a"), ("lark", 'start: "a"')]
    for kind, text in kinds:
        grammars.check(Grammar(kind, text))
