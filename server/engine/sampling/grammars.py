"""The grammars of a server's requests, compiled for its model's tokens. Threads that admit and the engine's use it."""

import threading
from collections.abc import Iterable

from llguidance import LLMatcher
from tokenizers import Tokenizer

from server.engine.grammar import MAX_CHARACTERS, Grammar, GrammarError
from server.engine.grammar_trial import MAX_BYTES
from server.engine.grammar_trials import GrammarTrials
from server.engine.sampling.grammar_compiler import GrammarCompiler, fault
from server.engine.sampling.grammar_state import GrammarState, words

MAX_KEPT, MAX_KEPT_CHARACTERS = 64, 4 * MAX_CHARACTERS
"""Compiled grammars that are kept for the next request: of 0.1 MB, up to some 15 MB with as long a text as can be."""

QUICK_SECONDS, SECONDS = 0.1, 0.5
"""Of computing, that a grammar's first trial and its last may take. What comes in practice takes half of the first at most."""


class Grammars:
    """`num_tokens` are those the model has logits of. Raises `GrammarError` where its answers can follow none."""

    def __init__(self, tokenizer: Tokenizer, num_tokens: int, stop_ids: Iterable[int]) -> None:
        stops, num_tokens = sorted(stop_ids), max(num_tokens, tokenizer.get_vocab_size())
        text = tokenizer.to_str()
        self._compiler = GrammarCompiler(text, num_tokens, stops)
        tokens = {"tokenizer": text, "num_tokens": num_tokens, "stop_ids": stops}
        self._quick, self._slow = GrammarTrials(tokens, QUICK_SECONDS), GrammarTrials(tokens, SECONDS)
        self._stops = words(stops, num_tokens)
        self._kept: dict[Grammar, LLMatcher] = {}
        """What was used last is the last."""
        self._lock = threading.Lock()

    def knows(self, grammar: Grammar) -> bool:
        """Return whether a grammar was checked and is still kept."""
        return self._found(grammar) is not None

    def check_quickly(self, grammar: Grammar) -> bool:
        """Make sure that a grammar can be followed, before anything runs; return False where that takes long to say.

        Raises `GrammarError`.
        """
        if not self.knows(grammar):
            return self._take(grammar, self._quick.fault(grammar))
        return True

    def check(self, grammar: Grammar) -> None:
        """Make sure that a grammar can be followed, however long that may take to say. Raises `GrammarError`."""
        if not self.knows(grammar) and not self._take(grammar, self._slow.fault(grammar)):
            raise GrammarError(f"takes more than {SECONDS:g} s or {MAX_BYTES >> 20} MiB to compile")

    def start(self, grammar: Grammar) -> GrammarState:
        """Returns the state before the first token of one that was checked."""
        return GrammarState((self._found(grammar) or self._compile(grammar)).deep_copy(), self._stops)

    def _take(self, grammar: Grammar, said: str | None) -> bool:
        if said:
            raise GrammarError(said)
        if said is None:
            return False
        self._keep(grammar, self._compile(grammar))
        return True

    def _found(self, grammar: Grammar) -> LLMatcher | None:
        with self._lock:
            if found := self._kept.pop(grammar, None):
                self._kept[grammar] = found  # now the last
            return found

    def _compile(self, grammar: Grammar) -> LLMatcher:
        matcher = self._compiler.compile(grammar)
        matcher.compute_bitmask()  # What it finds its copies know.
        assert not fault(matcher), "a trial has found the same tokens"
        return matcher

    def _keep(self, grammar: Grammar, matcher: LLMatcher) -> None:
        with self._lock:
            self._kept[grammar] = matcher
            while len(self._kept) > MAX_KEPT or sum(len(one.text) for one in self._kept) > MAX_KEPT_CHARACTERS:
                del self._kept[next(iter(self._kept))]
