"""The grammar compiler, and the process that tries grammars. No torch: that process is small.

Compiling a hostile grammar takes minutes or all memory, and only the end of its process stops it. `python -m
server.engine.sampling.compiler` reads a line of JSON about the model's tokens, then one line for each grammar and its seconds,
and answers each with a line: the fault as JSON text, or null where time or memory did not suffice. Each is tried in a fork.
Measured with 49,152 tokens: grammars in practice take 0.4 to 40 ms, and a mask 20 to 80 us.
"""

import gc
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from contextlib import suppress
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
        """Return what follows the grammar from its beginning. Raises `GrammarError`; hostile ones take very long."""
        matcher = LLMatcher(self._tokens, _source(grammar), limits=LIMITS, log_level=0)
        if said := fault(matcher):
            raise GrammarError(said)
        return matcher


def fault(matcher: LLMatcher) -> str:
    """Return what is wrong with the grammar, as far as it was followed; nothing where nothing is."""
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


CLOCK_FACTOR = 40.0
"""How many times its seconds of computing a trial may take by the clock."""
MAX_BYTES = 2**30
NUM_STEPS = 8
"""Tokens that are written, any that are allowed: many a grammar is only then seen to be too large."""


def try_out(compiler: GrammarCompiler, grammar: Grammar) -> str:
    """Return what is wrong with a grammar, or nothing."""
    try:
        matcher = compiler.compile(grammar)
    except GrammarError as error:
        return str(error)
    for step in range(NUM_STEPS):
        mask = matcher.compute_bitmask()
        if (said := fault(matcher)) or matcher.is_stopped():
            return said
        matcher.consume_token(_allowed_near(mask, len(mask) * step // NUM_STEPS))
    return fault(matcher)


def _allowed_near(mask: bytes, start: int) -> int:
    place = next(place % len(mask) for place in range(start, start + len(mask)) if mask[place % len(mask)])
    lowest = mask[place] & -mask[place]
    return 8 * place + lowest.bit_length() - 1


def answer(compiler: GrammarCompiler, grammar: Grammar, seconds: float) -> str | None:
    """Return what a fork finds wrong with a grammar; None where it was ended, for time or memory.

    `seconds` are of computing.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        _try_here(compiler, grammar, writer, seconds)
    os.close(writer)
    with open(reader, encoding="utf-8") as said:
        found = said.read()
    _, status = os.waitpid(child, 0)
    return found if status == 0 else None


def _try_here(compiler: GrammarCompiler, grammar: Grammar, writer: int, seconds: float) -> NoReturn:
    try:
        with suppress(ValueError, OSError):  # not every system has this limit
            resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
        # Nobody handles these: they end the process, whatever it is in.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, CLOCK_FACTOR * seconds)
        os.write(writer, try_out(compiler, grammar).encode())
        os._exit(0)
    finally:
        os._exit(1)


def main() -> None:
    """Try what comes, until nothing comes."""
    os.nice(5)  # Steps go first.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    compiler = GrammarCompiler(**json.loads(sys.stdin.readline()))
    gc.freeze()  # What forks share stays shared.
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(answer(compiler, Grammar(**asked["grammar"]), asked["seconds"])), flush=True)


if __name__ == "__main__":
    main()
