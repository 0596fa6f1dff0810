"""A process that tries grammars: compiling a hostile one takes minutes or all memory, and nothing can stop it but its end.

`python -m server.engine.grammar_trial` reads a line of JSON about the model's tokens, then one for each grammar, and answers each
with a line: what is wrong with it, as JSON text. Each is tried in a fork, which ends with its time or memory.
"""

import gc
import json
import os
import resource
import signal
import sys
from contextlib import suppress
from typing import NoReturn

from server.engine.grammar import Grammar, GrammarError
from server.engine.sampling.grammar_compiler import GrammarCompiler, fault

SECONDS, MAX_SECONDS = 0.5, 20.0
"""Of computing, and by the clock; what comes in practice takes less than a tenth of it."""
MAX_BYTES = 2**30
NUM_STEPS = 8
"""Tokens that are written, any that are allowed: many a grammar is only then seen to be too large."""


def try_out(compiler: GrammarCompiler, grammar: Grammar) -> str:
    """Returns what is wrong with a grammar, or nothing."""
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


def answer(compiler: GrammarCompiler, grammar: Grammar) -> str:
    """Returns what a fork finds wrong with a grammar, or that it had to be ended."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        _try_here(compiler, grammar, writer)
    os.close(writer)
    with open(reader, encoding="utf-8") as said:
        found = said.read()
    _, status = os.waitpid(child, 0)
    return found if status == 0 else f"takes more than {SECONDS:g} s or {MAX_BYTES >> 20} MiB to compile"


def _try_here(compiler: GrammarCompiler, grammar: Grammar, writer: int) -> NoReturn:
    try:
        with suppress(ValueError, OSError):  # not every system has this limit
            resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
        # Nobody handles these: they end the process, whatever it is in.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
        os.write(writer, try_out(compiler, grammar).encode())
        os._exit(0)
    finally:
        os._exit(1)


def main() -> None:
    """Tries what comes, until nothing comes."""
    os.nice(5)  # Steps go first.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    compiler = GrammarCompiler(**json.loads(sys.stdin.readline()))
    gc.freeze()  # What forks share stays shared.
    for line in sys.stdin:
        print(json.dumps(answer(compiler, Grammar(**json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
