"""OpenTelemetry: one span per request, continued in the engine. Does nothing if no endpoint is
configured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import propagate, trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

__all__ = ["configure_tracing", "outgoing", "span"]

_tracer: trace.Tracer | None = None


def configure_tracing(endpoint: str | None) -> None:
    """Send spans to an OTLP collector over HTTP; None sends none."""
    global _tracer
    if endpoint is None:
        _tracer = None
        return
    provider = TracerProvider(resource=Resource.create({"service.name": "reft-serve-gateway"}))
    provider.add_span_processor(
        BatchSpanProcessor(OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces"))
    )
    _tracer = provider.get_tracer("reft_serve.gateway")


@contextmanager
def span(name: str, headers: Mapping[str, str], attributes: Mapping[str, str]) -> Iterator[None]:
    """A span around a request, below the caller's own where its headers name one."""
    if _tracer is None:
        yield
        return
    context = propagate.extract(dict(headers))
    with _tracer.start_as_current_span(
        name, context, trace.SpanKind.SERVER, attributes=dict(attributes)
    ):
        yield


def outgoing() -> dict[str, str]:
    """Headers that continue the current span in an engine."""
    carried: dict[str, str] = {}
    if _tracer is not None:
        propagate.inject(carried)
    return carried
