"""The engine's thread, its watchdog, and the one bridge between asyncio and the engine.

Commands enter by a queue; events leave on the event loop. If the engine dies, every request gets an error, `is_alive` turns
false and `has_died` true. The watchdog is one timer a process: it ends the process when a step, or the shutdown, takes too long.
It is Python's `faulthandler`, whose thread needs no Python lock (a kernel that never returns may hold them). It writes the
stacks of all threads to standard error as plain text, and the process exits with 1.
"""

import asyncio
import faulthandler
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from server.engine.adapters.cache import Place
from server.engine.engine import Engine
from server.engine.request import DoneEvent, ErrorEvent, Event, Request

logger = logging.getLogger(__name__)


STDERR = 2
REARM_S = 1.0
"""Setting the timer starts a thread: 50 us, and on a machine that is busy some milliseconds. So not at each step."""


class Watchdog:
    """Ends the process when a step takes longer than `limit_s`, or up to `REARM_S` more; never where that is 0.

    For the engine's thread alone.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._armed_at: float | None = None

    @property
    def slack_s(self) -> float:
        """Seconds in which the engine may still rest without `disarm`; 0 where it has to be called, or was."""
        return 0.0 if self._armed_at is None else max(0.0, self._armed_at + REARM_S - time.monotonic())

    def begin_step(self) -> None:
        """Give the step that begins now its time."""
        if self._limit_s and not self.slack_s:
            self._armed_at = time.monotonic()
            end_process_after(self._limit_s + REARM_S)

    def disarm(self) -> None:
        """Let the engine rest for as long as it likes."""
        if self._armed_at is not None:
            self._armed_at = None
            faulthandler.cancel_dump_traceback_later()


def end_process_after(seconds: float) -> None:
    """End the process in `seconds`, unless it has ended by then, or the timer is set anew."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=STDERR)


Command = Callable[[Engine], None] | None
T = TypeVar("T")
S = TypeVar("S")


class EngineDeadError(Exception):
    """The engine is not running; nothing can be answered any more."""


class EngineThread:
    """Runs an engine; use from the event loop alone.

    Where a step, or a command between two, takes longer than `max_step_s`, the whole process ends (`Watchdog`); 0 is no limit.
    """

    def __init__(self, engine: Engine, max_step_s: float = 0) -> None:
        self._engine = engine
        self._watchdog = Watchdog(max_step_s)
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._events: dict[str, asyncio.Queue[Event]] = {}
        self._told: list[tuple[str, Event]] = []
        self._calls: set[asyncio.Future[Any]] = set()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.is_alive = self.has_died = False

    def start(self) -> None:
        """Start the thread; events will be heard on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self.is_alive = True
        self._thread.start()

    def request_stop(self) -> None:
        """Let the current step end, then ends the thread and tells whoever still waits. Returns at once."""
        self._commands.put(None)

    async def stop(self) -> None:
        """Stop the engine and waits until it has ended."""
        self.request_stop()
        await asyncio.to_thread(self._thread.join)

    @property
    def num_requests(self) -> int:
        """Requests that are waiting or running."""
        return len(self._events)

    def places(self) -> Mapping[str, Place]:
        """Return where the adapters are that are not on disk alone, by digest. Any thread may ask; it waits for no step."""
        return self._engine.tiers.places()

    async def call(self, command: Callable[[Engine], T]) -> T:
        """Return what `command` does between two steps, on the engine's thread; what it raises is raised here.

        It is done also where nobody waits for it any more. Raises `EngineDeadError` where the engine is not running, or ends
        before it is done.
        """
        if not self.is_alive:
            raise EngineDeadError("the engine is not running")
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._calls.add(answer)
        self._commands.put(partial(self._answer, command, answer))
        try:
            return await answer
        finally:
            self._calls.discard(answer)

    async def generate(self, request: Request) -> AsyncGenerator[Event, None]:
        """Yield the events of a request as they come; closing the generator aborts the request."""
        if not self.is_alive:
            # It was alive when the request was admitted: a stream may have begun.
            yield ErrorEvent("the engine is not running")
            return
        events: asyncio.Queue[Event] = asyncio.Queue()
        self._events[request.id] = events
        num_running = request.num_choices
        try:
            self._engine.tiers.prefetch(request)
            self._commands.put(lambda engine: engine.submit(request, partial(self._emit, request.id)))
            while num_running:
                event = await events.get()
                yield event
                num_running = 0 if isinstance(event, ErrorEvent) else num_running - isinstance(event, DoneEvent)
        finally:
            del self._events[request.id]
            self._commands.put(lambda engine: engine.abort(request.id))

    def _answer(self, command: Callable[[Engine], T], answer: asyncio.Future[T], engine: Engine) -> None:
        assert self._loop is not None
        try:
            result = command(engine)
        except Exception as error:  # noqa: BLE001 - it is the caller's, and no reason to end the engine
            self._loop.call_soon_threadsafe(_settle, answer, answer.set_exception, error)
        else:
            self._loop.call_soon_threadsafe(_settle, answer, answer.set_result, result)

    def _emit(self, request_id: str, event: Event) -> None:
        self._told.append((request_id, event))

    def _tell(self) -> None:
        # All events of a step at once: waking the event loop takes longer than hearing them.
        if self._told:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._hear, self._told)
            self._told = []

    def _hear(self, told: list[tuple[str, Event]]) -> None:
        for request_id, event in told:
            if request_id in self._events:
                self._events[request_id].put_nowait(event)

    def _run(self) -> None:
        last = ErrorEvent("the server is stopping", "stop")
        try:
            self._serve()
        except BaseException as error:  # whatever it was, every request and /health hear of it
            last = ErrorEvent(f"the engine died: {error!r}")
            logger.critical("the engine died; every request fails, and the server has to be started again", exc_info=error)
        finally:
            self._watchdog.disarm()
            self._tell()
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._die, last)
            self._engine.tiers.close()

    def _serve(self) -> None:
        self._engine.tiers.on_arrival(lambda: self._commands.put(Engine.wake))
        while True:
            try:
                command = self._next_command()
            except queue.Empty:
                self._watchdog.begin_step()
                self._engine.step()
                self._tell()
                continue
            if command is None:
                return
            self._watchdog.begin_step()
            command(self._engine)

    def _next_command(self) -> Command:
        """Return the next command. Raises `queue.Empty` where the engine is to step first."""
        if self._engine.can_step:
            return self._commands.get_nowait()
        if slack_s := self._watchdog.slack_s:  # idle, but maybe not for long
            patience_s = self._patience()
            with suppress(queue.Empty):
                return self._commands.get(timeout=slack_s if patience_s is None else min(slack_s, patience_s))
        self._watchdog.disarm()
        return self._commands.get(timeout=self._patience())

    def _patience(self) -> float | None:
        left = self._engine.time_left()
        return None if left is None else min(left, threading.TIMEOUT_MAX)

    def _die(self, last: ErrorEvent) -> None:
        self.is_alive, self.has_died = False, last.kind != "stop"
        for events in self._events.values():
            events.put_nowait(last)
        for answer in self._calls:
            _settle(answer, answer.set_exception, EngineDeadError(last.message))


def _settle(answer: asyncio.Future[T], settle: Callable[[S], None], outcome: S) -> None:
    if not answer.done():  # nobody waits any more
        settle(outcome)
