"""The engine's thread, its watchdog, and the one bridge between asyncio and the engine.

Commands enter by a queue; events leave on the event loop. If the engine dies, every request gets an error, `is_alive` becomes
false and `has_died` true.

There is one watchdog timer per process. It ends the process if a step, or the shutdown, takes too long. The timer is Python's
`faulthandler`, whose thread does not need the GIL: a kernel that never returns may hold the GIL. It writes the stacks of all
threads to standard error as plain text, and the process exits with 1.
"""

import asyncio
import faulthandler
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from lori.auto_weights import PromptQuery
from server.engine.adapters.residents import TierUsage
from server.engine.engine import Engine
from server.engine.request import DoneEvent, ErrorEvent, Event, Request

logger = logging.getLogger(__name__)


STDERR = 2
REARM_S = 1.0
"""How often the timer is set at most. Setting it starts a thread, which takes 50 us, and milliseconds on a busy machine."""


class Watchdog:
    """A watchdog that ends the process if a step takes longer than `limit_s`, plus up to `REARM_S`. 0 disables it.

    Only the engine's thread may use it.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._armed_at: float | None = None

    @property
    def slack_s(self) -> float:
        """Seconds for which the engine may still rest without calling `disarm`; 0 if the timer is not set or must be disarmed."""
        return 0.0 if self._armed_at is None else max(0.0, self._armed_at + REARM_S - time.monotonic())

    def begin_step(self) -> None:
        """Give the step that begins now its time."""
        if self._limit_s and not self.slack_s:
            self._armed_at = time.monotonic()
            end_process_after(self._limit_s + REARM_S)

    def disarm(self) -> None:
        """Stop the timer, so that the engine may rest for any time."""
        if self._armed_at is not None:
            self._armed_at = None
            faulthandler.cancel_dump_traceback_later()


def end_process_after(seconds: float) -> None:
    """End the process in `seconds`, unless it ends before or the timer is set again."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=STDERR)


Command = Callable[[Engine], None] | None
CheckPresent = Callable[[], Awaitable[None]]
"""Function that raises an error if a client has disconnected."""
PRESENCE_S = 0.1
"""Seconds between two checks whether the client of prompts that wait is present."""
T = TypeVar("T")
S = TypeVar("S")


class EngineDeadError(Exception):
    """The engine is not running, so it can answer no request."""


class EngineThread:
    """The thread that runs an engine. Use it from the event loop only.

    If a step, or a command between two steps, takes longer than `max_step_s`, the whole process ends (`Watchdog`). 0 means no
    limit.
    """

    def __init__(self, engine: Engine, max_step_s: float = 0) -> None:
        self._engine = engine
        self._watchdog = Watchdog(max_step_s)
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._events: dict[str, asyncio.Queue[Event]] = {}
        self._pending_events: list[tuple[str, Event]] = []
        self._pending_calls: set[asyncio.Future[Any]] = set()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self.is_alive = self.has_died = False

    def start(self) -> None:
        """Start the thread. Events are delivered on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self.is_alive = True
        self._thread.start()

    def request_stop(self) -> None:
        """Ask the thread to end after the current step. Requests that still run get an error. Returns at once."""
        self._commands.put(None)

    async def stop(self) -> None:
        """Stop the engine and wait until its thread has ended."""
        self.request_stop()
        await asyncio.to_thread(self._thread.join)

    @property
    def num_requests(self) -> int:
        """Number of requests that wait or run."""
        return len(self._events)

    def tier_usage(self) -> Mapping[str, TierUsage]:
        """Return the bytes in each tier of every adapter that is in RAM or in a slot, by digest. Thread-safe; does not wait."""
        return self._engine.adapter_cache.tier_usage()

    async def call(self, command: Callable[[Engine], T]) -> T:
        """Run `command` between two steps on the engine's thread and return its result. Its exceptions are raised here.

        The command runs even if the caller is cancelled. Raises `EngineDeadError` if the engine is not running, or ends before
        the command is done.
        """
        if not self.is_alive:
            raise EngineDeadError("the engine is not running")
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._pending_calls.add(future)
        self._commands.put(partial(self._run_command, command, future))
        try:
            return await future
        finally:
            self._pending_calls.discard(future)

    async def evaluate(
        self, queries: Sequence[PromptQuery[T]], priority: int, tenant: str, check_present: CheckPresent
    ) -> Sequence[T]:
        """Return the results of prompts' queries. They are computed on the engine's thread, see `PromptWeigher`.

        `check_present` is called again and again meanwhile, and once at the end. If it raises, or the caller is cancelled, the
        prompts are dropped. Raises its errors, `EngineDeadError` as `call`, and `ProbeError`.
        """
        if not self.is_alive:
            raise EngineDeadError("the engine is not running")
        futures: list[asyncio.Future[T]] = [asyncio.get_running_loop().create_future() for _ in queries]
        self._pending_calls.update(futures)
        for query, future in zip(queries, futures, strict=True):
            self._commands.put(partial(self._submit_query, query, priority, tenant, future))
        try:
            is_waiting = True
            while is_waiting:
                done, pending = await asyncio.wait(futures, timeout=PRESENCE_S, return_when=asyncio.FIRST_EXCEPTION)
                is_waiting = bool(pending) and not [future for future in done if future.exception()]
                await check_present()
            return await asyncio.gather(*futures)
        finally:
            self._pending_calls.difference_update(futures)
            for future in futures:
                future.cancel()  # one has failed, or the caller was cancelled

    async def generate(self, request: Request) -> AsyncGenerator[Event, None]:
        """Yield the events of a request as they come. Closing the generator aborts the request."""
        if not self.is_alive:
            # The engine was alive when the request was admitted; the response may have begun, so this must be an event.
            yield ErrorEvent("the engine is not running")
            return
        events: asyncio.Queue[Event] = asyncio.Queue()
        self._events[request.id] = events
        num_unfinished = request.sampling.num_choices
        try:
            self._engine.adapter_cache.prefetch(request)
            self._commands.put(lambda engine: engine.submit(request, partial(self._emit, request.id)))
            while num_unfinished:
                event = await events.get()
                yield event
                num_unfinished = 0 if isinstance(event, ErrorEvent) else num_unfinished - isinstance(event, DoneEvent)
        finally:
            del self._events[request.id]
            self._commands.put(lambda engine: engine.abort(request.id))

    def _run_command(self, command: Callable[[Engine], T], future: asyncio.Future[T], engine: Engine) -> None:
        assert self._loop is not None
        try:
            result = command(engine)
        except Exception as error:  # noqa: BLE001 - the caller gets it; it must not end the engine
            self._loop.call_soon_threadsafe(_settle, future, future.set_exception, error)
        else:
            self._loop.call_soon_threadsafe(_settle, future, future.set_result, result)

    def _submit_query(self, query: PromptQuery[T], priority: int, tenant: str, future: asyncio.Future[T], engine: Engine) -> None:
        assert engine.weigher, "a request that needs one is refused without a background"
        engine.weigher.submit(query, priority, tenant, lambda: not future.done(), partial(self._settle_query, future))

    def _settle_query(self, future: asyncio.Future[T], outcome: Any) -> None:
        assert self._loop is not None
        if isinstance(outcome, Exception):
            self._loop.call_soon_threadsafe(_settle, future, future.set_exception, outcome)
        else:
            self._loop.call_soon_threadsafe(_settle, future, future.set_result, outcome)

    def _emit(self, request_id: str, event: Event) -> None:
        self._pending_events.append((request_id, event))

    def _flush_events(self) -> None:
        # All events of a step in one call: waking the event loop takes longer than delivering an event.
        if self._pending_events:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._deliver, self._pending_events)
            self._pending_events = []

    def _deliver(self, events: list[tuple[str, Event]]) -> None:
        for request_id, event in events:
            if request_id in self._events:
                self._events[request_id].put_nowait(event)

    def _run(self) -> None:
        last_event = ErrorEvent("the server is stopping", "stop")
        try:
            self._serve()
        except BaseException as error:  # whatever it was, every request and /health must report it
            last_event = ErrorEvent(f"the engine died: {error!r}")
            logger.critical("the engine died; every request fails, and the server has to be started again", exc_info=error)
        finally:
            self._watchdog.disarm()
            self._flush_events()
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._die, last_event)
            self._engine.adapter_cache.close()

    def _serve(self) -> None:
        self._engine.adapter_cache.on_arrival(lambda: self._commands.put(Engine.wake))
        while True:
            try:
                command = self._next_command()
            except queue.Empty:
                self._watchdog.begin_step()
                self._engine.step()
                self._flush_events()
                continue
            if command is None:
                return
            self._watchdog.begin_step()
            command(self._engine)

    def _next_command(self) -> Command:
        """Return the next command. Raises `queue.Empty` if the engine should step first."""
        if self._engine.can_step:
            return self._commands.get_nowait()
        if slack_s := self._watchdog.slack_s:  # idle, but perhaps not for long
            max_wait_s = self._max_wait_s()
            with suppress(queue.Empty):
                return self._commands.get(timeout=slack_s if max_wait_s is None else min(slack_s, max_wait_s))
        self._watchdog.disarm()
        return self._commands.get(timeout=self._max_wait_s())

    def _max_wait_s(self) -> float | None:
        seconds = self._engine.time_left()
        return None if seconds is None else min(seconds, threading.TIMEOUT_MAX)

    def _die(self, last_event: ErrorEvent) -> None:
        self.is_alive, self.has_died = False, last_event.kind != "stop"
        for events in self._events.values():
            events.put_nowait(last_event)
        for future in self._pending_calls:
            _settle(future, future.set_exception, EngineDeadError(last_event.message))


def _settle(future: asyncio.Future[T], setter: Callable[[S], None], value: S) -> None:
    if not future.done():  # done if the caller was cancelled
        setter(value)
