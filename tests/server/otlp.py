"""A collector of traces on loopback, which receives OTLP over HTTP and stores the spans."""

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span


@dataclass
class Collector:
    """The traces that were sent to `url`."""

    url: str
    spans: list[Span] = field(default_factory=list)
    resources: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


def value(wrapped: AnyValue) -> Any:
    """Return an attribute's value as a Python object."""
    kind = wrapped.WhichOneof("value")
    assert kind
    content = getattr(wrapped, kind)
    return [value(each) for each in content.values] if kind == "array_value" else content


def attributes(source: Any) -> dict[str, Any]:
    """Return the attributes of a span or a resource."""
    return {each.key: value(each.value) for each in source.attributes}


@contextmanager
def collector() -> Iterator[Collector]:
    """Listen on a free port until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            received.paths.append(self.path)
            for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                received.resources.append(attributes(group.resource))
                received.spans += [span for scope in group.scope_spans for span in scope.spans]
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the library's name
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        received = Collector(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield received
        finally:
            server.shutdown()
            thread.join()
