"""Grammars of running requests: compiled once, followed token by token, and applied to the logits as masks.

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

Bitmask = NDArray[np.int32]

MASK_SECONDS, MASK_SECONDS_PER_TOKEN = 0.1, 0.002
"""CPU seconds that a sequence has for its masks, which all other sequences wait for: about twenty times what masks take in
practice."""


def bitmask(tokens: Iterable[int], num_tokens: int) -> Bitmask:
    """Return the bitmask (W,) of `tokens`, for a vocabulary of `num_tokens`."""
    bits = np.zeros(-(-num_tokens // 32) * 32, dtype=bool)
    bits[[token for token in tokens if token < num_tokens]] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


class GrammarState:
    """The state of one sequence's grammar: its own `matcher`, which follows the sequence's output.

    `follow` must always get the same output, unchanged or longer, even if the sequence was preempted and computed again.
    """

    def __init__(self, matcher: LLMatcher, stops: Bitmask) -> None:
        self._matcher, self._stops = matcher, stops
        self._num_read, self._seconds = -1, MASK_SECONDS
        self.allowed = np.zeros_like(stops)
        """Bitmask (W,) of the tokens that may come next. Stop tokens are among them if the output may end."""
        self.fault = ""
        """The reason why the output cannot go on. Then no token is allowed."""

    def follow(self, output_ids: Items[int]) -> None:
        """Read the output tokens that are new since the last call, and compute the tokens that may come next."""
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
        """Whether only a stop token may come next."""
        return not (self.allowed & ~self._stops).any()

    def _read(self, tokens: Items[int]) -> None:
        self._matcher.consume_tokens([*tokens])
        self._matcher.unsafe_compute_mask_ptr(self.allowed.ctypes.data, self.allowed.nbytes)
        if message := fault(self._matcher):
            self.fault = f"the grammar can be followed no further: {message}"


BOUNDS = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), np.inf, -np.inf)
BOUNDS = BOUNDS.astype(np.float32)
"""Upper bounds (256, 8) of the logits of the tokens in a byte of a bitmask. `minimum` with these takes a third of a masked fill's
time."""


class GrammarMasks:
    """Grammar masks on the logits. Keeps its working memory: on a CPU, allocating that much costs more than using it."""

    def __init__(self) -> None:
        self._bounds = np.empty((0, 8), dtype=np.float32)
        self._before = np.empty((0, 0), dtype=np.float32)

    @contextmanager
    def masked(self, logits: torch.Tensor, allowed: Mapping[int, Bitmask]) -> Iterator[None]:
        """Forbid all but the `allowed` tokens in these rows of `logits` (P, V), in place. At the end the rows are restored.

        Does not wait for the device.
        """
        if not allowed:
            yield
        elif logits.device.type == "cpu":
            with self._masked_on_cpu(logits.numpy(), allowed):
                yield
        else:
            with _masked_on_device(logits, allowed):
                yield

    @contextmanager
    def _masked_on_cpu(self, logits: NDArray[np.float32], allowed: Mapping[int, Bitmask]) -> Iterator[None]:
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

    def _reserve(self, num_tokens: int, allowed: Mapping[int, Bitmask]) -> None:
        num_bytes = next(iter(allowed.values())).nbytes
        if len(self._bounds) != num_bytes:
            self._bounds = np.empty((num_bytes, 8), dtype=np.float32)
        if self._before.shape[0] < len(allowed) or self._before.shape[1] != num_tokens:
            self._before = np.empty((len(allowed), num_tokens), dtype=np.float32)


@contextmanager
def _masked_on_device(logits: torch.Tensor, allowed: Mapping[int, Bitmask]) -> Iterator[None]:
    rows = to_device(torch.tensor([*allowed], dtype=torch.int64), logits.device)
    packed = to_device(torch.from_numpy(np.stack([*allowed.values()])), logits.device)  # (G, W)
    bit = torch.arange(32, dtype=torch.int32, device=logits.device)
    is_forbidden = (packed[:, :, None] >> bit & 1 == 0).flatten(1)[:, : logits.shape[1]]  # (G, V)
    before = logits[rows]
    logits[rows] = before.masked_fill(is_forbidden, -torch.inf)
    try:
        yield
    finally:
        logits[rows] = before


class GrammarTrials:
    """Trials of grammars in another process, which starts when it is first needed. Thread-safe.

    `tokens` are the arguments of `GrammarCompiler`. Each grammar may take `seconds` of CPU time.
    """

    def __init__(self, tokens: Mapping[str, object], seconds: float) -> None:
        self._tokens, self._seconds = json.dumps(tokens), seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._finalize: Callable[[], object] = lambda: None

    def fault(self, grammar: Grammar) -> str | None:
        """Return the fault of a grammar: empty if it has none, None if its trial exceeded time or memory. One at a time."""
        with self._lock:
            return self._ask(json.dumps({"grammar": asdict(grammar), "seconds": self._seconds}))

    def _ask(self, line: str) -> str | None:
        process = self._process or self._start()
        assert process.stdin
        assert process.stdout
        try:
            print(line, file=process.stdin, flush=True)
            message: str | None = json.loads(process.stdout.readline())
        except (OSError, ValueError) as error:
            self._process = None  # the next grammar starts another process
            self._finalize()
            raise ChildProcessError("the process that tries grammars has ended") from error
        return message

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
    # A fork of the process may keep the pipes open for a while.
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with suppress(BrokenPipeError):  # of a process that had died, with input that it never read
            assert pipe
            pipe.close()
    process.wait()


MAX_COMPILED, MAX_COMPILED_CHARACTERS = 64, 4 * MAX_CHARACTERS
"""Maximum number of compiled grammars to keep, and of their characters. A grammar takes 0.1 MB, or up to 15 MB with the longest
text."""

QUICK_TRIAL_SECONDS, TRIAL_SECONDS = 0.1, 0.5
"""CPU seconds of a grammar's first trial, and of its last one. In practice a grammar takes at most half of the first."""


class Grammars:
    """The grammars of a model with logits of `num_tokens` tokens. Raises `GrammarError` if its answers cannot follow any."""

    def __init__(self, tokenizer: Tokenizer, num_tokens: int, stop_ids: Iterable[int]) -> None:
        stops, num_tokens = sorted(stop_ids), max(num_tokens, tokenizer.get_vocab_size())
        text = tokenizer.to_str()
        self._compiler = GrammarCompiler(text, num_tokens, stops)
        tokens = {"tokenizer": text, "num_tokens": num_tokens, "stop_ids": stops}
        self._quick, self._slow = GrammarTrials(tokens, QUICK_TRIAL_SECONDS), GrammarTrials(tokens, TRIAL_SECONDS)
        self._stops = bitmask(stops, num_tokens)
        self._compiled: dict[Grammar, LLMatcher] = {}
        """Compiled grammars, the most recently used last."""
        self._lock = threading.Lock()

    def knows(self, grammar: Grammar) -> bool:
        """Return whether a grammar was checked and is still kept."""
        return self._lookup(grammar) is not None

    def check_quickly(self, grammar: Grammar) -> bool:
        """Check that a grammar can be followed. Return False if a trial of `QUICK_TRIAL_SECONDS` does not decide it.

        Raises `GrammarError` if it cannot be followed.
        """
        if not self.knows(grammar):
            return self._accept(grammar, self._quick.fault(grammar))
        return True

    def check(self, grammar: Grammar) -> None:
        """Check that a grammar can be followed.

        Raises `GrammarError` if it cannot, or if a trial of `TRIAL_SECONDS` does not decide it.
        """
        if not self.knows(grammar) and not self._accept(grammar, self._slow.fault(grammar)):
            raise GrammarError(f"takes more than {TRIAL_SECONDS:g} s or {MAX_BYTES >> 20} MiB to compile")

    def start(self, grammar: Grammar) -> GrammarState:
        """Return the state of a checked grammar before the first token."""
        return GrammarState((self._lookup(grammar) or self._compile(grammar)).deep_copy(), self._stops)

    def _accept(self, grammar: Grammar, message: str | None) -> bool:
        if message:
            raise GrammarError(message)
        if message is None:
            return False
        self._store(grammar, self._compile(grammar))
        return True

    def _lookup(self, grammar: Grammar) -> LLMatcher | None:
        with self._lock:
            if matcher := self._compiled.pop(grammar, None):
                self._compiled[grammar] = matcher  # now the most recently used
            return matcher

    def _compile(self, grammar: Grammar) -> LLMatcher:
        matcher = self._compiler.compile(grammar)
        matcher.compute_bitmask()  # copies share what the mask's computation found
        assert not fault(matcher), "a trial has found the same tokens"
        return matcher

    def _store(self, grammar: Grammar, matcher: LLMatcher) -> None:
        with self._lock:
            self._compiled[grammar] = matcher
            while len(self._compiled) > MAX_COMPILED or sum(len(key.text) for key in self._compiled) > MAX_COMPILED_CHARACTERS:
                del self._compiled[next(iter(self._compiled))]
