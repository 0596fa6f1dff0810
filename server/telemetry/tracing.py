"""Optional traces by OpenTelemetry, which is an extra and only imported if traces are requested."""

import os
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from lori.errors import LoriError

if TYPE_CHECKING:  # only for types: the start of a program need not wait for it
    from fastapi import FastAPI

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
OURS = "http/protobuf"
MISSING = "traces are asked for by {by}, and OpenTelemetry is not installed: pip install '.[otel]' ({error})"


class TracingError(LoriError):
    """Traces are requested and cannot be sent."""


class Tracing(Protocol):
    """Interface of the exporter that sends spans in the background."""

    def instrument(self, app: "FastAPI") -> None:
        """Make each request of an app a span."""

    def stop(self) -> None:
        """Send the spans that are left."""


def start_tracing(endpoint: str | None, environment: Mapping[str, str] = os.environ) -> Tracing | None:
    """Return the exporter of traces to `endpoint`, or as the environment says. Returns None if neither requests traces.

    Raises `TracingError`.
    """
    variables = [name for name in ENDPOINTS if environment.get(name)]
    if not endpoint and (not variables or environment.get("OTEL_TRACES_EXPORTER") == "none"):
        return None
    origin = "--otlp-traces-endpoint" if endpoint else variables[0]
    for name in PROTOCOLS:
        if environment.get(name, OURS) != OURS:
            raise TracingError(f"{name}: found {environment[name]!r}, expected {OURS!r}, the one protocol that is spoken here")
    try:
        started: Tracing = import_module("server.telemetry.spans").Spans(endpoint)
    except ImportError as error:
        raise TracingError(MISSING.format(by=origin, error=error)) from error
    return started
