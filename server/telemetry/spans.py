"""A span for each HTTP request, sent by OTLP over HTTP. The standard environment variables configure everything else."""

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
    """Exporter of spans to `endpoint`, or as the environment says, from a thread of its own.

    A slow collector delays no request.
    """

    def __init__(self, endpoint: str | None) -> None:
        server_resource = Resource({"service.name": NAME, "service.version": version("lori-server")})
        resource = Resource.create().merge(server_resource).merge(OTELResourceDetector().detect())
        # `stop` shuts it down, at the end of the server's drain.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint and _full_endpoint(endpoint))))

    def instrument(self, app: FastAPI) -> None:
        """Have `app` start a span for each request, as a child of the client's `traceparent`.

        The span is `scope["state"]["span"]` of the request's ASGI scope. Requests for `PROBES` have none, unless the environment
        variable `EXCLUDED` says otherwise.
        """
        FastAPIInstrumentor.instrument_app(
            app,
            server_request_hook=_keep_span,
            tracer_provider=self._provider,
            excluded_urls=os.environ.get(EXCLUDED, PROBES),
            exclude_spans=["receive", "send"],  # a span for each message of a stream takes longer than the message
        )

    def stop(self) -> None:
        """Send the spans that are left. Waits at most `STOP_S` for the collector."""
        thread = threading.Thread(target=self._provider.shutdown, name="spans", daemon=True)
        thread.start()
        thread.join(STOP_S)


def _keep_span(span: Span, scope: dict[str, Any]) -> None:
    scope.setdefault("state", {})["span"] = span


def _full_endpoint(endpoint: str) -> str:
    return endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + "/v1/traces"
