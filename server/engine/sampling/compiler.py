"""The grammar compiler, and the process that tries grammars. No torch, so that this process is small.

Compiling a hostile grammar takes minutes or all memory, and only the end of its process stops it. `python -m
server.engine.sampling.compiler` reads a line of JSON with the model's tokens, then a line with a grammar and its time limit for
each trial. It answers each trial with a line: the fault as a JSON string, or null if the trial exceeded its time or memory. Each
trial runs in a fork. Measured with 49,152 tokens: grammars in practice take 0.4 to 40 ms, and a mask 20 to 80 us.
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
"""Limits within which a mask takes at most about 100 ms, and a sequence's state about 25 MB."""
WHITESPACE = r"[ \t]|\r?\n[ \t]{0,64}"
"""Whitespace between the parts of a JSON text. It is bounded, because small models write blanks without end if they may."""
MAX_MESSAGE = 300


class GrammarCompiler:
    """A compiler for one model's tokens.

    `tokenizer` is a tokenizer of the library `tokenizers`, as JSON. `stop_ids` end an answer.
    """

    def __init__(self, tokenizer: str, num_tokens: int, stop_ids: Items[int]) -> None:
        ends = [token for token in stop_ids if token < num_tokens]
        if not ends:
            raise GrammarError("the base model has no stop token, so no answer would end")
        try:
            self._tokens = LLTokenizer(tokenizer, n_vocab=num_tokens, eos_token=ends)
        except ValueError as error:
            raise GrammarError(f"the base model's tokenizer is none that llguidance knows: {error}") from error

    def compile(self, grammar: Grammar) -> LLMatcher:
        """Return a matcher at the grammar's beginning. Raises `GrammarError`. A hostile grammar takes very long."""
        matcher = LLMatcher(self._tokens, _source(grammar), limits=LIMITS, log_level=0)
        if message := fault(matcher):
            raise GrammarError(message)
        return matcher


def fault(matcher: LLMatcher) -> str:
    """Return the fault of a grammar, as far as it was followed; empty if there is none."""
    if not matcher.is_error():
        return ""
    message = matcher.get_error()
    if message.startswith("NoExtension"):
        return "no text can be what it asks for"
    return _short(message.replace("<non-verbose/>", ""))


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_MESSAGE else f"{line[: MAX_MESSAGE - 1]}…"


def _source(grammar: Grammar) -> str:
    if len(grammar.text) > MAX_CHARACTERS:
        raise GrammarError(f"has {len(grammar.text)} characters, expected at most {MAX_CHARACTERS}")
    try:
        return SOURCES[grammar.kind](grammar.text)
    except ValueError as error:
        raise GrammarError(_short(str(error))) from error


def _schema_source(text: str) -> str:
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
    "json_object": lambda _: _schema_source('{"type": "object"}'),
    "json_schema": _schema_source,
    "regex": LLMatcher.grammar_from_regex,
    "lark": LLMatcher.grammar_from_lark,
}


CLOCK_FACTOR = 40.0
"""Maximum wall-clock time of a trial, as a multiple of its CPU time."""
MAX_BYTES = 2**30
NUM_STEPS = 8
"""Number of tokens that a trial follows, each any allowed one. Many grammars turn out to be too large only then."""


def try_grammar(compiler: GrammarCompiler, grammar: Grammar) -> str:
    """Return the fault of a grammar; empty if it has none."""
    try:
        matcher = compiler.compile(grammar)
    except GrammarError as error:
        return str(error)
    for step in range(NUM_STEPS):
        mask = matcher.compute_bitmask()
        if (message := fault(matcher)) or matcher.is_stopped():
            return message
        matcher.consume_token(_allowed_near(mask, len(mask) * step // NUM_STEPS))
    return fault(matcher)


def _allowed_near(mask: bytes, start: int) -> int:
    index = next(index % len(mask) for index in range(start, start + len(mask)) if mask[index % len(mask)])
    lowest = mask[index] & -mask[index]
    return 8 * index + lowest.bit_length() - 1


def try_in_fork(compiler: GrammarCompiler, grammar: Grammar, seconds: float) -> str | None:
    """Return the fault that a fork finds in a grammar; None if the fork was ended for exceeding its time or memory.

    `seconds` is the limit of CPU time.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        _try_and_exit(compiler, grammar, writer, seconds)
    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:
        message = pipe.read()
    _, status = os.waitpid(child, 0)
    return message if status == 0 else None


def _try_and_exit(compiler: GrammarCompiler, grammar: Grammar, writer: int, seconds: float) -> NoReturn:
    try:
        with suppress(ValueError, OSError):  # some systems lack this limit
            resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
        # No handler is set for these signals, so they end the process, whatever it is doing.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, CLOCK_FACTOR * seconds)
        os.write(writer, try_grammar(compiler, grammar).encode())
        os._exit(0)
    finally:
        os._exit(1)


def main() -> None:
    """Try the grammars that arrive on stdin, until it is closed."""
    os.nice(5)  # steps have priority
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    compiler = GrammarCompiler(**json.loads(sys.stdin.readline()))
    gc.freeze()  # keeps the memory that forks share from being copied
    for line in sys.stdin:
        trial = json.loads(line)
        print(json.dumps(try_in_fork(compiler, Grammar(**trial["grammar"]), trial["seconds"])), flush=True)


if __name__ == "__main__":
    main()
