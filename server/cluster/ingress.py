"""The ingress: accepts HTTP requests, and sends each to the replica that has its adapters, or to all.

Knows no engine, model or Ray.
"""

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

import anyio
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.access.gate import client_of
from server.access.hosts import AllowedHosts
from server.access.key_ring import KeyRing
from server.access.limits import RateLimiter
from server.affinity import ANY
from server.cluster.destination import METRICS_PATH, affinity_key, is_for_all_replicas, read_fields
from server.cluster.merged_replies import merged_adapters, merged_metrics
from server.cluster.refusal import batch_refusal, checked_caller
from server.cluster.relay import pass_on, portable, whole_body
from server.schemas.errors import error_reply, kind_of
from server.settings import MAX_RECEIVED, MIB, Settings
from server.transport.bodies import Bodies, BodyLimit
from server.transport.cors import Cors
from server.transport.request_id import HEADER as ID_HEADER
from server.transport.request_id import request_id

logger = logging.getLogger(__name__)
MAX_TRIES = 3
"""Replicas that a request is sent to, one after the other, if they die before they begin to answer."""
RETRY = {"Retry-After": "1"}
UPLOAD = ("POST", "/adapters")


class ReplicaLostError(Exception):
    """A replica died, or cannot be reached."""


class NoReplicaError(ReplicaLostError):
    """There is no replica, and has been none for a while. An immediate retry is of no use."""

    def __init__(self) -> None:
        super().__init__("no replica is there")


class Stream(Protocol):
    """An answer, as it comes."""

    def __aiter__(self) -> AsyncIterator[Sequence[Message]]:
        """Yield the messages that are there.

        Raises `ReplicaLostError`; `NoReplicaError` if it has waited for a replica too long.
        """

    def cancel(self) -> None:
        """Cancel the request: the client has left."""


class Replicas(Protocol):
    """Interface of the replicas that answer."""

    def ask(self, scope: Mapping[str, Any], body: bytes, key: str) -> Stream:
        """Return the answer of the replica that has the adapters of `key`. Raises `NoReplicaError`."""

    async def ask_all(self, scope: Mapping[str, Any], body: bytes) -> Mapping[str, Sequence[Message]]:
        """Return the whole answer of each replica, by its name, without those that are lost or have not joined.

        There is at least one. Raises `ReplicaLostError`.
        """

    async def watch(self) -> None:
        """Watch the replicas until cancelled.

        Answers of a replica that can no longer be reached raise `ReplicaLostError`, requests do not wait for a replica for ever,
        and new replicas learn of the changes before them.
        """


class Ingress:
    """The ASGI application before the replicas.

    A request without a valid key, a change without an admin's key, and a request above its tenant's rate are refused here: their
    bodies are not read, and no replica gets them. If a replica dies before it begins to answer, the request goes to another one,
    because the client has seen nothing of it.
    """

    def __init__(
        self, replicas: Replicas, keys: KeyRing | None, settings: Settings, base_model: str, num_ingresses: int = 1
    ) -> None:
        """`settings` are those of one server. `num_ingresses` share the rate of each tenant."""
        self._replicas, self._keys, self._base_model = replicas, keys, base_model
        self._hosts = None if keys else AllowedHosts.from_settings(settings)
        self._rate = RateLimiter(num_ingresses)
        self._num_received, self._opens_metrics = 0, settings.open_metrics
        uploads = {UPLOAD: settings.max_upload_bytes}
        bodies = Bodies(settings.max_bodies_mib * MIB, settings.max_body_bytes)
        self._limited = BodyLimit(self._answer, settings.max_body_bytes, settings.max_body_s, uploads, bodies, client_of)
        self._app: ASGIApp = Cors(self._authorize, settings.cors_origins) if settings.cors_origins else self._authorize

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or run the lifespan."""
        if scope["type"] == "lifespan":
            await self._run_lifespan(receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._app(scope, receive, send)

    async def _run_lifespan(self, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as group:
            if self._keys:
                group.start_soon(self._keys.watch)
            group.start_soon(self._replicas.watch)
            for answer in ("lifespan.startup.complete", "lifespan.shutdown.complete"):
                await receive()
                await send({"type": answer})
            group.cancel_scope.cancel()

    async def _authorize(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = checked_caller(scope, self._keys, self._rate, opens_metrics=self._opens_metrics, hosts=self._hosts)
        if isinstance(caller, JSONResponse):
            await caller(scope, receive, send)
        else:
            await self._limited({**scope, "state": {**scope.get("state", {}), "caller": caller}}, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (scope["method"], scope["path"]) != UPLOAD:
            await self._read(scope, receive, send)
        elif self._num_received == MAX_RECEIVED:
            message = f"{MAX_RECEIVED} adapters are being received, which is the limit; try again"
            await JSONResponse(error_reply(429, "RateLimitError", message, None), 429, RETRY)(scope, receive, send)
        else:
            self._num_received += 1
            try:
                await self._read(scope, receive, send)
            finally:
                self._num_received -= 1

    async def _read(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await whole_body(receive)
        except HTTPException as error:  # the body is too long, or too slow
            reply = error_reply(error.status_code, kind_of(error.status_code), error.detail, None)
            await JSONResponse(reply, error.status_code, error.headers)(scope, receive, send)
            return
        if body is not None:
            await self._ask(scope, body, receive, send)

    async def _ask(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        if is_for_all_replicas(scope["method"], scope["path"]):
            await self._ask_all(portable(scope), body, receive, send)
            return
        key = ANY
        if scope["method"] == "POST":
            fields = read_fields(body)
            if refusal := batch_refusal(scope, scope["state"]["caller"], self._rate, fields):
                await refusal(scope, receive, send)
                return
            key = affinity_key(fields, self._base_model)
        await self._ask_one(portable(scope), body, key, receive, send)

    async def _ask_one(self, scope: Mapping[str, Any], body: bytes, key: str, receive: Receive, send: Send) -> None:
        has_begun = False

        async def tracked(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(_without_id(message))

        for num_tries in range(1, MAX_TRIES + 1):
            try:
                answers = self._replicas.ask(scope, body, key)
                await pass_on(answers, receive, tracked, answers.cancel)
                return
            except ReplicaLostError as error:
                if has_begun:
                    logger.warning("%s broke off: %s", _request_line(scope), error)
                    raise
                if num_tries == MAX_TRIES or isinstance(error, NoReplicaError):
                    await _lost(error, RETRY)(dict(scope), receive, send)
                    return
                logger.warning("%s is sent again: %s", _request_line(scope), error)
            except Exception:  # Ray's are of many kinds
                if has_begun:
                    raise
                await _fail(scope, receive, send)
                return

    async def _ask_all(self, scope: Mapping[str, Any], body: bytes, receive: Receive, send: Send) -> None:
        try:
            answers = await self._replicas.ask_all(scope, body)
        except ReplicaLostError as error:
            # The outcome of a change is unknown, so the client is not told to retry.
            await _lost(error, RETRY if scope["method"] == "GET" else {})(dict(scope), receive, send)
            return
        except Exception:  # noqa: BLE001  # Ray's are of many kinds; the log has it
            await _fail(scope, receive, send)
            return
        if scope["method"] == "GET" and all(_status(answer) == 200 for answer in answers.values()):
            bodies = {name: _body(answer) for name, answer in answers.items()}
            if scope["path"] == METRICS_PATH:
                texts = {name: body.decode() for name, body in bodies.items()}
                reply = Response(await run_in_threadpool(merged_metrics, texts), media_type=CONTENT_TYPE_LATEST)
            else:
                reply = Response(await run_in_threadpool(merged_adapters, [*bodies.values()]), media_type="application/json")
            await reply(dict(scope), receive, send)
            return
        # A refusal has the reason; if all replicas agree, any answer will do.
        for message in max(answers.values(), key=_status):
            await send(_without_id(message))


async def _fail(scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
    logger.exception("%s failed", _request_line(scope))
    reply = error_reply(500, "InternalServerError", "the server failed; its log says why", None)
    await JSONResponse(reply, 500)(dict(scope), receive, send)


def _request_line(scope: Mapping[str, Any]) -> str:
    return f"{scope['method']} {scope['path']} request_id={request_id(scope['headers'])!r}"


def _without_id(message: Message) -> Message:
    # Ray also puts the request's id into the answer.
    if message["type"] != "http.response.start":
        return message
    return {**message, "headers": [(name, value) for name, value in message["headers"] if name != ID_HEADER]}


def _status(answer: Sequence[Message]) -> int:
    return int(answer[0]["status"])


def _body(answer: Sequence[Message]) -> bytes:
    return b"".join(message.get("body", b"") for message in answer)


def _lost(error: ReplicaLostError, headers: Mapping[str, str]) -> JSONResponse:
    return JSONResponse(error_reply(503, "ServiceUnavailableError", str(error), None), 503, headers)
