"""Request log: one line for every HTTP request, at its end. The outermost middleware.

Neither prompts nor answers are logged, unless the operator asks for them.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.schemas.errors import error_reply
from server.telemetry.account import Account
from server.telemetry.exchange import Exchange, current
from server.telemetry.metrics import Metrics
from server.telemetry.trace_attributes import Span, attributes
from server.transport.request_id import HEADER, request_id

logger, error_logger = logging.getLogger("server.request"), logging.getLogger(__name__)
PROBES = ("/health", "/ping", "/ready", "/metrics")
"""Routes that machines request every few seconds. They are logged at level DEBUG, or when they fail."""
NO_ROUTE = "none"
CLIENT_CLOSED = 499
"""The status that proxies log for a request whose client left before the answer."""
MAX_PATH = 200
NO_SNIFF = (b"x-content-type-options", b"nosniff")
"""A header of every answer: browsers never take it for another type of content, whatever a client put into it."""
MESSAGE = "%s %s %d"


class RequestLog:
    """Middleware that gives each request an id, which its answer carries, and logs the request when it is over.

    While `is_draining()`, each answer closes its connection.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, is_draining: Callable[[], bool]) -> None:
        self._app, self._metrics, self._is_draining = app, metrics, is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and watch its outcome."""
        if scope["type"] == "http":
            await _WatchedRequest(self._metrics, self._is_draining, scope, receive, send).run(self._app)
        else:
            await self._app(scope, receive, send)


class ScopeNote:
    """The innermost middleware: notes the scope that reaches the routes, which may be a copy. It has the route and the caller."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if exchange := current.get():
            exchange.scope = scope
        await self._app(scope, receive, send)


class _WatchedRequest:
    # One request and its outcome, from its messages.

    def __init__(self, metrics: Metrics, is_draining: Callable[[], bool], scope: Scope, receive: Receive, send: Send) -> None:
        self._metrics, self._is_draining = metrics, is_draining
        self._scope, self._receive, self._send = scope, receive, send
        self._exchange = Exchange(request_id(scope["headers"]))
        self._span: Span | None = scope.setdefault("state", {}).get("span")
        self._started = time.monotonic()
        self._status = 0
        """Status of the answer; 0 until it begins."""
        self._is_whole = self._has_disconnected = False

    async def run(self, app: ASGIApp) -> None:
        current.set(self._exchange)
        try:
            await app(self._scope, self.receive, self.send)
        except Exception as error:  # log and answer a fault of the server; if the answer has begun, uvicorn ends it
            if self._status:
                raise
            error_logger.error("%s failed", self._exchange.id, exc_info=error)
            if self._span:
                self._span.record_exception(error)
            await _failed_reply()(self._scope, self.receive, self.send)
        finally:
            self._end()

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._is_whole:
            self._has_disconnected = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            message["headers"] = [*message.get("headers", ()), (HEADER, self._exchange.id.encode()), NO_SNIFF]
            if self._is_draining():
                message["headers"].append((b"connection", b"close"))
        elif not message.get("more_body", False):
            self._is_whole = not self._has_disconnected
            self._trace()  # before the send, which ends the span
        await self._send(message)

    def _trace(self) -> None:
        if self._span and self._span.is_recording():
            self._span.set_attributes(attributes(self._exchange, self._metrics.base_model))

    def _end(self) -> None:
        self._trace()
        route = getattr((self._exchange.scope or self._scope).get("route"), "path", NO_ROUTE)
        status = self._status or CLIENT_CLOSED
        self._metrics.count_answer(route, status)
        level = logging.DEBUG if route in PROBES and status < 400 else logging.INFO
        if logger.isEnabledFor(level):
            logger.log(level, MESSAGE, self._scope["method"], route, status, extra=self._fields(route, status))

    def _fields(self, route: str, status: int) -> dict[str, Any]:
        scope = self._exchange.scope or self._scope
        caller = scope["state"].get("caller")
        fields: dict[str, Any] = {
            "request_id": self._exchange.id,
            "trace_id": f"{self._span.get_span_context().trace_id:032x}" if self._span else None,
            "method": scope["method"],
            "route": route,
            "path": scope.get("raw_path", b"").decode("ascii", "backslashreplace")[:MAX_PATH] if route == NO_ROUTE else None,
            "status": status,
            "client": scope["client"][0] if scope.get("client") else None,
            "tenant": getattr(caller, "tenant", None) or None,
            "key_id": getattr(caller, "key_id", None) or None,
            "total_s": round(time.monotonic() - self._started, 6),
            "disconnected": self._has_disconnected or None,
            "unfinished": True if self._status and not (self._is_whole or self._has_disconnected) else None,
        }
        fields |= self._exchange.refusal
        if self._exchange.accounts:
            fields |= _account_fields(self._exchange.accounts)
        return {key: value for key, value in fields.items() if value is not None}


def _failed_reply() -> JSONResponse:
    # The traceback is in the log.
    return JSONResponse(error_reply(500, "InternalServerError", "the server failed; its log says why", None), 500)


def _account_fields(accounts: Sequence[Account]) -> dict[str, Any]:
    # Tokens of all accounts. Times and adapters of the first, which are near those of the others.
    first = accounts[0]
    timings = first.timings
    texts = [(account.request.prompt_text, "".join(account.texts)) for account in accounts if account.keeps_text]
    return {
        "generations": [account.request.id for account in accounts],
        "adapters": [term.reference for term in first.request.terms],
        "weights": [term.weight for term in first.request.terms],
        "block_weights": block_weights if any(block_weights := [term.block_weights for term in first.request.terms]) else None,
        "named_merges": list(first.request.merge_names) or None,
        "base_share": first.request.base_share,
        "policy": [term.reference for term in first.request.policy] or None,
        "prompt_tokens": sum(account.num_prompt_tokens for account in accounts),
        "completion_tokens": sum(account.num_completion_tokens for account in accounts),
        "finish_reason": accounts[-1].reason,
        "queue_s": round(timings.queue, 6) if timings else None,
        "first_token_s": None if first.first_token_s is None else round(first.first_token_s, 6),
        "prompts": [prompt for prompt, _ in texts] or None,
        "texts": [text for _, text in texts] or None,
    }
