"""Grammars of running requests: compiled once, followed token by token, applied to the logits as masks.

Shapes: P rows, V vocabulary, G rows that have a grammar, W words of 32 tokens, the lowest bit first.
"""

import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Items
from contextlib import contextmanager, suppress
from dataclasses import asdict

import numpy as np
import torch
from llguidance import LLMatcher
from numpy.typing import NDArray
from tokenizers import Tokenizer

from lori.device import to_device
from server.engine.grammar import MAX_CHARACTERS, Grammar, GrammarError
from server.engine.sampling.compiler import MAX_BYTES, GrammarCompiler, fault

Words = NDArray[np.int32]

MASK_SECONDS, MASK_SECONDS_PER_TOKEN = 0.1, 0.002
"""Of computing, that a sequence has for its masks: others wait for them. It is some twenty times what they take in practice."""


def words(tokens: Iterable[int], num_tokens: int) -> Words:
    """Return (W,): the bits of `tokens`, of `num_tokens` that there are."""
    bits = np.zeros(-(-num_tokens // 32) * 32, dtype=bool)
    bits[[token for token in tokens if token < num_tokens]] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


class GrammarState:
    """Follows the output of one sequence with a `matcher` of its own.

    It is to hear of the same output, grown or as it was, however often the sequence is computed.
    """

    def __init__(self, matcher: LLMatcher, stops: Words) -> None:
        self._matcher, self._stops = matcher, stops
        self._num_read, self._seconds = -1, MASK_SECONDS
        self.allowed = np.zeros_like(stops)
        """(W,): the tokens that may come next; a stop token where the output may end."""
        self.fault = ""
        """Why it can be followed no further; then nothing is allowed."""

    def follow(self, output_ids: Items[int]) -> None:
        """Read what the output has more than at the last call, and finds what may come next."""
        if self.fault or len(output_ids) == self._num_read:
            return
        started = time.thread_time()
        self._read(output_ids[max(0, self._num_read) :])
        self._num_read = len(output_ids)
        self._seconds += MASK_SECONDS_PER_TOKEN - (time.thread_time() - started)
        if not self.fault and self._seconds < 0:
            self.fault = "the grammar takes too long to say what may come next"
        if self.fault:
            self.allowed[:] = 0

    @property
    def can_only_end(self) -> bool:
        """Whether nothing may come next but a stop token."""
        return not (self.allowed & ~self._stops).any()

    def _read(self, tokens: Items[int]) -> None:
        self._matcher.consume_tokens([*tokens])
        self._matcher.unsafe_compute_mask_ptr(self.allowed.ctypes.data, self.allowed.nbytes)
        if said := fault(self._matcher):
            self.fault = f"the grammar can be followed no further: {said}"


BOUNDS = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), np.inf, -np.inf)
BOUNDS = BOUNDS.astype(np.float32)
"""(256, 8): for a byte of bits, what its tokens' logits are to be at most. A third of the time that a masked fill takes."""


class GrammarMasks:
    """Keeps memory to work in: on a CPU fresh memory of that size costs more than what is done in it."""

    def __init__(self) -> None:
        self._bounds = np.empty((0, 8), dtype=np.float32)
        self._before = np.empty((0, 0), dtype=np.float32)

    @contextmanager
    def confined(self, logits: torch.Tensor, allowed: Mapping[int, Words]) -> Iterator[None]:
        """Forbid all but the tokens `allowed` in those rows of `logits` (P, V), in place; at the end all is as it was.

        It does not wait for the device.
        """
        if not allowed:
            yield
        elif logits.device.type == "cpu":
            with self._confined_here(logits.numpy(), allowed):
                yield
        else:
            with _confined_there(logits, allowed):
                yield

    @contextmanager
    def _confined_here(self, logits: NDArray[np.float32], allowed: Mapping[int, Words]) -> Iterator[None]:
        self._reserve(logits.shape[1], allowed)
        rows = [*zip(allowed, self._before, strict=False)]
        for row, before in rows:
            np.copyto(before, logits[row])
        try:
            for row, tokens in allowed.items():
                np.take(BOUNDS, tokens.view(np.uint8), axis=0, out=self._bounds, mode="clip")
                np.minimum(logits[row], self._bounds.reshape(-1)[: logits.shape[1]], out=logits[row])
            yield
        finally:
            for row, before in rows:
                np.copyto(logits[row], before)

    def _reserve(self, num_tokens: int, allowed: Mapping[int, Words]) -> None:
        num_bytes = next(iter(allowed.values())).nbytes
        if len(self._bounds) != num_bytes:
            self._bounds = np.empty((num_bytes, 8), dtype=np.float32)
        if self._before.shape[0] < len(allowed) or self._before.shape[1] != num_tokens:
            self._before = np.empty((len(allowed), num_tokens), dtype=np.float32)


@contextmanager
def _confined_there(logits: torch.Tensor, allowed: Mapping[int, Words]) -> Iterator[None]:
    rows = to_device(torch.tensor([*allowed], dtype=torch.int64), logits.device)
    packed = to_device(torch.from_numpy(np.stack([*allowed.values()])), logits.device)  # (G, W)
    place = torch.arange(32, dtype=torch.int32, device=logits.device)
    is_forbidden = (packed[:, :, None] >> place & 1 == 0).flatten(1)[:, : logits.shape[1]]  # (G, V)
    before = logits[rows]
    logits[rows] = before.masked_fill(is_forbidden, -torch.inf)
    try:
        yield
    finally:
        logits[rows] = before


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
        """Return what is wrong with a grammar, or nothing; None where its time or memory did not suffice. One at a time."""
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
        command = [sys.executable, "-m", "server.engine.sampling.compiler"]
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


MAX_KEPT, MAX_KEPT_CHARACTERS = 64, 4 * MAX_CHARACTERS
"""Compiled grammars that are kept for the next request: of 0.1 MB, up to some 15 MB with as long a text as can be."""

QUICK_TRIAL_SECONDS, TRIAL_SECONDS = 0.1, 0.5
"""Of computing, that a grammar's first trial and its last may take. What comes in practice takes half of the first at most."""


class Grammars:
    """`num_tokens` are those the model has logits of. Raises `GrammarError` where its answers can follow none."""

    def __init__(self, tokenizer: Tokenizer, num_tokens: int, stop_ids: Iterable[int]) -> None:
        stops, num_tokens = sorted(stop_ids), max(num_tokens, tokenizer.get_vocab_size())
        text = tokenizer.to_str()
        self._compiler = GrammarCompiler(text, num_tokens, stops)
        tokens = {"tokenizer": text, "num_tokens": num_tokens, "stop_ids": stops}
        self._quick, self._slow = GrammarTrials(tokens, QUICK_TRIAL_SECONDS), GrammarTrials(tokens, TRIAL_SECONDS)
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
            raise GrammarError(f"takes more than {TRIAL_SECONDS:g} s or {MAX_BYTES >> 20} MiB to compile")

    def start(self, grammar: Grammar) -> GrammarState:
        """Return the state before the first token of one that was checked."""
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
