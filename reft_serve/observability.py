"""Logging (JSON lines with the request id) and every metric except those of engines, each declared
once.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar

from prometheus_client import Counter, Gauge, Histogram

__all__ = [
    "ENGINE_IN_FLIGHT",
    "ENGINE_UNUSABLE",
    "ENGINE_UP",
    "FIRST_BYTE_SECONDS",
    "JOBS",
    "JOBS_ENDED",
    "JOBS_RUNNING",
    "JOBS_WAITING",
    "JOB_MEMORY",
    "LEDGER_PENDING",
    "LIMITED",
    "LOADS",
    "LOAD_SECONDS",
    "QUEUED",
    "QUEUE_SECONDS",
    "REQUESTS",
    "REQUEST_SECONDS",
    "RETRIES",
    "TOKENS",
    "TRAINED_TOKENS",
    "WEBHOOKS",
    "WORKER_READY",
    "BoundedNames",
    "configure_logging",
    "request_id",
]

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_LONG = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

REQUESTS = Counter(
    "reft_requests", "Requests by route and response status.", ["route", "status", "tenant"]
)
REQUEST_SECONDS = Histogram(
    "reft_request_seconds",
    "Time from a request's first byte to the last byte of its response.",
    ["route"],
    buckets=_LONG,
)
FIRST_BYTE_SECONDS = Histogram(
    "reft_first_byte_seconds",
    "Time from a request's first byte to the first byte of its response.",
    ["route"],
    buckets=_SHORT,
)
TOKENS = Counter(
    "reft_tokens",
    "Tokens by kind: prompt, cached (included in prompt), completion.",
    ["tenant", "adapter", "kind"],
)
QUEUE_SECONDS = Histogram(
    "reft_queue_seconds", "Time that requests waited for an engine.", buckets=_SHORT
)
QUEUED = Gauge("reft_queued_requests", "Requests waiting for an engine.")
ENGINE_UP = Gauge(
    "reft_engine_up", "1 if the engine responds to health checks, else 0.", ["engine"]
)
ENGINE_UNUSABLE = Gauge(
    "reft_engine_unusable", "1 while the engine is unusable, by reason.", ["engine", "reason"]
)
ENGINE_IN_FLIGHT = Gauge(
    "reft_engine_in_flight", "Requests in progress on an engine, from this gateway.", ["engine"]
)
RETRIES = Counter("reft_retries", "Requests retried on another engine before their response began.")
LOADS = Counter(
    "reft_adapter_loads", "Loads of adapter versions into engines, by result.", ["result"]
)
LOAD_SECONDS = Histogram(
    "reft_adapter_load_seconds", "Time to load an adapter version into one engine.", buckets=_SHORT
)
LIMITED = Counter("reft_limited_requests", "Requests rejected by a limit.", ["tenant", "limit"])
JOBS = Gauge("reft_jobs", "Fine-tuning jobs of all tenants in the database, by status.", ["status"])
JOBS_WAITING = Gauge(
    "reft_jobs_waiting", "Fine-tuning jobs waiting for a worker; scale the workers by it."
)
WEBHOOKS = Counter(
    "reft_webhook_deliveries",
    "Webhook delivery attempts by result: delivered, retried or given_up.",
    ["result"],
)
LEDGER_PENDING = Gauge(
    "reft_ledger_pending_records", "Usage records not yet committed to the database."
)

JOBS_RUNNING = Gauge("reft_worker_jobs", "Fine-tuning jobs running on this worker.")
JOBS_ENDED = Counter(
    "reft_worker_jobs_ended", "Job attempts that ended on this worker, by outcome.", ["how"]
)
JOB_MEMORY = Gauge("reft_worker_memory_bytes", "Estimated memory of this worker's jobs, in bytes.")
TRAINED_TOKENS = Counter("reft_worker_trained_tokens", "Tokens that this worker has trained on.")
WORKER_READY = Gauge("reft_worker_ready", "1 if this worker can take jobs, else 0.")

# Prometheus sees no increase from a missing series, so series with alerts start at zero.
for _counter, _values in (
    (LOADS, ("loaded", "failed")),
    (WEBHOOKS, ("delivered", "retried", "given_up")),
    (JOBS_ENDED, ("succeeded", "failed", "cancelled", "paused", "queued", "lost", "crashed")),
):
    for _value in _values:
        _counter.labels(_value)


class BoundedNames:
    """Bounded label values for names that users choose: the first `cap` names, then `other`."""

    def __init__(self, cap: int) -> None:
        self._cap = cap
        self._names: set[str] = set()

    def label(self, name: str | None) -> str:
        """The label value for a name; `none` for None."""
        if name is None:
            return "none"
        if name not in self._names:
            if len(self._names) >= self._cap:
                return "other"
            self._names.add(name)
        return name


class _JsonLines(logging.Formatter):
    """One JSON object per line: time, level, logger, message, the request id and the fields of
    `extra={"data": {...}}`.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        current = request_id.get()
        if current is not None:
            line["request_id"] = current
        line |= getattr(record, "data", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(level: str) -> None:
    """Write JSON lines to stderr: `reft_serve` at `level`, libraries at WARNING and above."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("reft_serve").setLevel(level)
