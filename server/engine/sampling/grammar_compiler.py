"""Compiles grammars for one model's tokens, within limits. Knows no sequence, and no torch: the process that tries them is small.

Measured with 49,152 tokens: what comes in practice takes 0.4 to 40 ms, and a mask 20 to 80 us.
"""

import json
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from typing import NoReturn

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from server.engine.grammar import MAX_CHARACTERS, Grammar, GrammarError, GrammarKind

LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
"""No mask takes much more than 100 ms within these, and no sequence's state more than some 25 MB."""
WHITESPACE = r"[ \t]|\r?\n[ \t]{0,64}"
"""Between two parts of a JSON text: small models that may write blanks for ever do."""
MAX_SAID = 300


class GrammarCompiler:
    """`tokenizer` is one of the library `tokenizers`, as JSON; `stop_ids` end an answer."""

    def __init__(self, tokenizer: str, num_tokens: int, stop_ids: Items[int]) -> None:
        ends = [token for token in stop_ids if token < num_tokens]
        if not ends:
            raise GrammarError("the base model has no stop token, so no answer would end")
        try:
            self._tokens = LLTokenizer(tokenizer, n_vocab=num_tokens, eos_token=ends)
        except ValueError as error:
            raise GrammarError(f"the base model's tokenizer is none that llguidance knows: {error}") from error

    def compile(self, grammar: Grammar) -> LLMatcher:
        """Returns what follows the grammar from its beginning. Raises `GrammarError`; hostile ones take very long."""
        matcher = LLMatcher(self._tokens, _source(grammar), limits=LIMITS, log_level=0)
        if said := fault(matcher):
            raise GrammarError(said)
        return matcher


def fault(matcher: LLMatcher) -> str:
    """Returns what is wrong with the grammar, as far as it was followed; nothing where nothing is."""
    if not matcher.is_error():
        return ""
    said = matcher.get_error()
    if said.startswith("NoExtension"):
        return "no text can be what it asks for"
    return _short(said.replace("<non-verbose/>", ""))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_SAID else f"{line[: MAX_SAID - 1]}…"


def _source(grammar: Grammar) -> str:
    if len(grammar.text) > MAX_CHARACTERS:
        raise GrammarError(f"has {len(grammar.text)} characters, expected at most {MAX_CHARACTERS}")
    try:
        return SOURCES[grammar.kind](grammar.text)
    except ValueError as error:
        raise GrammarError(_short(str(error))) from error


def _of_schema(text: str) -> str:
    try:
        schema = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"is not JSON: {error}") from error
    if schema is not True and not isinstance(schema, dict):
        raise GrammarError(f"a schema that anything fits is an object or true, found {_short(text)}")
    return LLMatcher.grammar_from_json_schema("{}" if schema is True else text, defaults={"whitespace_pattern": WHITESPACE})


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


SOURCES: Mapping[GrammarKind, Callable[[str], str]] = {
    "json_object": lambda _: _of_schema('{"type": "object"}'),
    "json_schema": _of_schema,
    "regex": LLMatcher.grammar_from_regex,
    "lark": LLMatcher.grammar_from_lark,
}
