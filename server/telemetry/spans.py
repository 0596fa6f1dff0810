"""A span for each HTTP request, sent by OTLP over HTTP. The standard environment variables say whatever is not said here."""

import os
import threading
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span

NAME = "lori-server"
EXCLUDED = "OTEL_PYTHON_FASTAPI_EXCLUDED_URLS"
STOP_S = 3
PROBES = "/health$,/ping$,/ready$,/metrics$"


class Spans:
    """Sends spans to `endpoint`, or where the environment says, from a thread of its own; a slow collector delays no request."""

    def __init__(self, endpoint: str | None) -> None:
        own = Resource({"service.name": NAME, "service.version": version("lori-server")})
        resource = Resource.create().merge(own).merge(OTELResourceDetector().detect())
        # At exit it is stopped by `stop`, in the server's own time.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint and _whole(endpoint))))

    def instrument(self, app: FastAPI) -> None:
        """Have each request be a span that goes on from the client's `traceparent`; it is `state["span"]` of the scope."""
        FastAPIInstrumentor.instrument_app(
            app,
            server_request_hook=_keep,
            tracer_provider=self._provider,
            excluded_urls=os.environ.get(EXCLUDED, PROBES),
            exclude_spans=["receive", "send"],  # a span for each message of a stream takes longer than the message
        )

    def stop(self) -> None:
        """Send what is left; a collector that does not answer is waited for no longer than `STOP_S`."""
        last = threading.Thread(target=self._provider.shutdown, name="spans", daemon=True)
        last.start()
        last.join(STOP_S)


def _keep(span: Span, scope: dict[str, Any]) -> None:
    scope.setdefault("state", {})["span"] = span


def _whole(endpoint: str) -> str:
    return endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + "/v1/traces"
