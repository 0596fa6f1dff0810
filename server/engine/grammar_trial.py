"""A process that tries grammars: compiling a hostile one takes minutes or all memory, and nothing can stop it but its end.

`python -m server.engine.grammar_trial` reads a line of JSON about the model's tokens, then one for each grammar and the seconds
it may take, and answers each with a line: what is wrong with it, as JSON text, or null where its time or memory did not suffice.
Each is tried in a fork, which ends with its time or memory.
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

CLOCK_FACTOR = 40.0
"""How many times its seconds of computing a trial may take by the clock."""
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


def answer(compiler: GrammarCompiler, grammar: Grammar, seconds: float) -> str | None:
    """Returns what a fork finds wrong with a grammar; None where it was ended, for time or memory.

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
    """Tries what comes, until nothing comes."""
    os.nice(5)  # Steps go first.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    compiler = GrammarCompiler(**json.loads(sys.stdin.readline()))
    gc.freeze()  # What forks share stays shared.
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(answer(compiler, Grammar(**asked["grammar"]), asked["seconds"])), flush=True)


if __name__ == "__main__":
    main()
