"""The grammars of a server's requests, compiled for its model's tokens. Threads that admit and the engine's use it."""

import threading
from collections.abc import Iterable

from llguidance import LLMatcher
from tokenizers import Tokenizer

from server.engine.grammar import MAX_CHARACTERS, Grammar, GrammarError
from server.engine.grammar_trials import GrammarTrials
from server.engine.sampling.grammar_compiler import GrammarCompiler, fault
from server.engine.sampling.grammar_state import GrammarState, words

MAX_KEPT, MAX_KEPT_CHARACTERS = 64, 4 * MAX_CHARACTERS
"""Compiled grammars that are kept for the next request: of 0.1 MB, up to some 15 MB with as long a text as can be."""


class Grammars:
    """`num_tokens` are those the model has logits of. Raises `GrammarError` where its answers can follow none."""

    def __init__(self, tokenizer: Tokenizer, num_tokens: int, stop_ids: Iterable[int]) -> None:
        stops, num_tokens = sorted(stop_ids), max(num_tokens, tokenizer.get_vocab_size())
        text = tokenizer.to_str()
        self._compiler = GrammarCompiler(text, num_tokens, stops)
        self._trials = GrammarTrials({"tokenizer": text, "num_tokens": num_tokens, "stop_ids": stops})
        self._stops = words(stops, num_tokens)
        self._kept: dict[Grammar, LLMatcher] = {}
        """What was used last is the last."""
        self._lock = threading.Lock()

    def check(self, grammar: Grammar) -> None:
        """Makes sure that a grammar can be followed, before anything runs. Raises `GrammarError` or `CrowdedError`."""
        if self._found(grammar):
            return
        if said := self._trials.fault(grammar):
            raise GrammarError(said)
        self._keep(grammar, self._compile(grammar))

    def start(self, grammar: Grammar) -> GrammarState:
        """Returns the state before the first token of one that was checked."""
        return GrammarState((self._found(grammar) or self._compile(grammar)).deep_copy(), self._stops)

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
