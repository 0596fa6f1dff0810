"""Traces by OpenTelemetry, where they are asked for; what they need is an extra, and is not imported before."""

import os
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from lori.errors import LoriError

if TYPE_CHECKING:  # what starts a program need not wait for it
    from fastapi import FastAPI

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
OURS = "http/protobuf"
MISSING = "traces are asked for by {by}, and OpenTelemetry is not installed: pip install '.[otel]' ({error})"


class TracingError(LoriError):
    """Traces are asked for and cannot be sent."""


class Tracing(Protocol):
    """Sends spans in the background."""

    def instrument(self, app: "FastAPI") -> None:
        """Have each request of an app be a span."""

    def stop(self) -> None:
        """Send what is left."""


def start_tracing(endpoint: str | None, environment: Mapping[str, str] = os.environ) -> Tracing | None:
    """Return what sends traces to `endpoint`, or where the environment says; None where neither asks. Raises `TracingError`."""
    asked = [name for name in ENDPOINTS if environment.get(name)]
    if not endpoint and (not asked or environment.get("OTEL_TRACES_EXPORTER") == "none"):
        return None
    by = "--otlp-traces-endpoint" if endpoint else asked[0]
    for name in PROTOCOLS:
        if environment.get(name, OURS) != OURS:
            raise TracingError(f"{name}: found {environment[name]!r}, expected {OURS!r}, the one protocol that is spoken here")
    try:
        started: Tracing = import_module("server.telemetry.spans").Spans(endpoint)
    except ImportError as error:
        raise TracingError(MISSING.format(by=by, error=error)) from error
    return started
