"""Asks another process (`grammar_trial`) whether a grammar can be compiled, before this one does."""

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict

from server.engine.grammar import Grammar


class GrammarTrials:
    """Starts the process when it is first needed. For any threads; `tokens` is what `GrammarCompiler` is made of.

    Each grammar may take `seconds` of computing.
    """

    def __init__(self, tokens: Mapping[str, object], seconds: float) -> None:
        self._tokens, self._seconds = json.dumps(tokens), seconds
        self._turn = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._finalize: Callable[[], object] = lambda: None

    def fault(self, grammar: Grammar) -> str | None:
        """Returns what is wrong with a grammar, or nothing; None where its time or memory did not suffice. One at a time."""
        with self._turn:
            return self._ask(json.dumps({"grammar": asdict(grammar), "seconds": self._seconds}))

    def _ask(self, line: str) -> str | None:
        process = self._process or self._start()
        assert process.stdin
        assert process.stdout
        try:
            print(line, file=process.stdin, flush=True)
            said: str | None = json.loads(process.stdout.readline())
        except (OSError, ValueError) as error:
            self._process = None  # The next grammar gets another.
            self._finalize()
            raise ChildProcessError("the process that tries grammars has ended") from error
        return said

    def _start(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", "server.engine.grammar_trial"]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env=environment,
            start_new_session=True,
        )
        self._finalize = weakref.finalize(self, _end, process)
        assert process.stdin
        print(self._tokens, file=process.stdin, flush=True)
        self._process = process
        return process


def _end(process: subprocess.Popen[str]) -> None:
    # A fork of it may hold the pipes for a while yet.
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with suppress(BrokenPipeError):  # of one that had died, with what it never read
            assert pipe
            pipe.close()
    process.wait()
