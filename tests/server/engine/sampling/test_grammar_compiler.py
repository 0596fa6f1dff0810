"""Grammar compiler: the grammars that it accepts, and the error messages for the others."""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from server.engine.grammar import MAX_CHARACTERS, Grammar, GrammarError, GrammarKind
from server.engine.sampling.compiler import GrammarCompiler
from tests.server.rig import EOS


@pytest.fixture(scope="module")
def compiler(tokenizer: PreTrainedTokenizerFast) -> GrammarCompiler:
    return GrammarCompiler(tokenizer.backend_tokenizer.to_str(), EOS + 1, [EOS])


def is_whole(compiler: GrammarCompiler, grammar: Grammar, text: str) -> bool:
    """Return whether `grammar` accepts `text` as a complete answer."""
    matcher = compiler.compile(grammar)
    ids = compiler._tokens.tokenize_str(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


PERSON = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)


@pytest.mark.parametrize(
    ("kind", "source", "whole", "others"),
    [
        ("json_object", "", ['{"a": [1, "b", null]}', "{}", '{\n  "a": {\n    "b": true\n  }\n}'], ["[]", "1", "", "{", "{} "]),
        (
            "json_schema",
            PERSON,
            ['{"name":"A","age":3}', '{"name": "", "age": -1}'],
            ['{"name":"A"}', '{"name":1,"age":3}', "{}"],
        ),
        ("json_schema", "true", ["1", '"a"', "[]", "{}"], ["", "a"]),
        ("json_schema", "{}", ["1", "null"], ["nul"]),
        ("regex", "(yes|no)!?", ["yes", "no!"], ["yes no", "maybe", ""]),
        ("regex", "a*", ["", "aaa"], ["b"]),
        ("lark", 'start: pair+\npair: "(" pair* ")"', ["()", "(())()"], ["(", ")", ""]),
    ],
)
def test_a_grammar_accepts_its_own_texts_and_no_others(
    compiler: GrammarCompiler, kind: GrammarKind, source: str, whole: list[str], others: list[str]
) -> None:
    grammar = Grammar(kind, source)
    assert [text for text in whole if not is_whole(compiler, grammar, text)] == []
    assert [text for text in others if is_whole(compiler, grammar, text)] == []


def test_json_has_little_whitespace_unless_its_schema_allows_more(compiler: GrammarCompiler) -> None:
    free = json.dumps({"type": "object", "x-guidance": {"whitespace_pattern": "[ \n]+"}})
    for text in ['{\n\n"a":1}', '{   "a":1}', '{"a":' + "\n " * 30 + "1}"]:
        assert not is_whole(compiler, Grammar("json_object"), text)
        assert is_whole(compiler, Grammar("json_schema", free), text)


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("json_schema", "{", "not JSON: .* line 1 column 2"),
        ("json_schema", "", "not JSON"),
        ("json_schema", '{"const": NaN}', "not JSON: NaN"),
        ("json_schema", "[" * 20_000, "not JSON: .*recursion"),
        ("json_schema", '{"items":' * 200 + "{}" + "}" * 200, "recursion limit"),
        ("json_schema", "[1]", r"an object or true, found \[1\]"),
        ("json_schema", "false", "found false"),
        ("json_schema", '{"type": "strin"}', "Invalid type: strin"),
        ("json_schema", '{"not": {}}', 'Unimplemented keys: ."not"'),
        ("json_schema", '{"type": "string", "format": "shoe size"}', "Unknown format: shoe size"),
        ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}', "minimum .5. is greater than maximum .3."),
        ("json_schema", '{"type": "string", "pattern": "(a"}', "unclosed group"),
        ("json_schema", '{"$ref": "#/$defs/none"}', "/.defs/none"),
        ("json_schema", '{"$ref": "http://localhost:1/schema"}', "does not fetch"),
        ("json_schema", '{"$ref": "file:///etc/hostname"}', "does not fetch"),
        ("json_schema", '{"x-guidance": {"lenientt": true}}', "unknown field `lenientt`"),
        ("regex", "(a", "unclosed group"),
        ("regex", r"(?=a)b", "look-around"),
        ("regex", "\ud800", "surrogates not allowed"),
        ("regex", "a" * (MAX_CHARACTERS + 1), f"has {MAX_CHARACTERS + 1} characters, expected at most {MAX_CHARACTERS}"),
        ("lark", "", "Empty grammar"),
        ("lark", "start: nothing", "unknown name: .nothing"),
        ("lark", "start: %$", "lexer error"),
        ("lark", "start: " + "(" * 3000 + '"a"' + ")" * 3000, "too deeply nested"),
    ],
)
def test_the_error_of_a_wrong_grammar_is_one_short_line(
    compiler: GrammarCompiler, kind: GrammarKind, source: str, message: str
) -> None:
    with pytest.raises(GrammarError, match=message) as caught:
        compiler.compile(Grammar(kind, source))
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_a_model_without_a_stop_token_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    text = tokenizer.backend_tokenizer.to_str()
    for stop_ids in ([], [EOS + 1]):
        with pytest.raises(GrammarError, match="no stop token"):
            GrammarCompiler(text, EOS + 1, stop_ids)


def test_an_unknown_tokenizer_is_refused() -> None:
    with pytest.raises(GrammarError, match="tokenizer"):
        GrammarCompiler('{"model": {}}', 10, [1])
