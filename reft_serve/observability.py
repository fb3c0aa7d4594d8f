"""What an operator sees: the log's format, the request's id in it, and every metric but an engine's own, declared once."""

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
    "reft_requests", "Requests by what they asked for and how they ended.", ["route", "status", "tenant"]
)
REQUEST_SECONDS = Histogram(
    "reft_request_seconds", "From a request's first byte to its answer's last.", ["route"], buckets=_LONG
)
FIRST_BYTE_SECONDS = Histogram(
    "reft_first_byte_seconds", "From a request's first byte to its answer's first.", ["route"], buckets=_SHORT
)
TOKENS = Counter(
    "reft_tokens", "Tokens by kind: prompt, cached (a part of prompt), completion.", ["tenant", "adapter", "kind"]
)
QUEUE_SECONDS = Histogram("reft_queue_seconds", "Time that requests waited for an engine.", buckets=_SHORT)
QUEUED = Gauge("reft_queued_requests", "Requests that wait for an engine.")
ENGINE_UP = Gauge("reft_engine_up", "Whether an engine answers.", ["engine"])
ENGINE_UNUSABLE = Gauge("reft_engine_unusable", "1 while an engine cannot be used, by reason.", ["engine", "reason"])
ENGINE_IN_FLIGHT = Gauge("reft_engine_in_flight", "Requests that an engine works on for this gateway.", ["engine"])
RETRIES = Counter("reft_retries", "Requests that were given to another engine before their answer began.")
LOADS = Counter("reft_adapter_loads", "Adapter versions that engines were asked to load.", ["result"])
LOAD_SECONDS = Histogram("reft_adapter_load_seconds", "Time to load a version into one engine.", buckets=_SHORT)
LIMITED = Counter("reft_limited_requests", "Requests that a limit turned away.", ["tenant", "limit"])
JOBS = Gauge("reft_jobs", "Fine-tuning jobs of all tenants by status, as the database has them.", ["status"])
JOBS_WAITING = Gauge("reft_jobs_waiting", "Fine-tuning jobs that wait for a worker: what to scale workers by.")
WEBHOOKS = Counter(
    "reft_webhook_deliveries", "Attempts to deliver an event: delivered, retried or given up.", ["result"]
)
LEDGER_PENDING = Gauge("reft_ledger_pending_records", "Usage records that are not committed yet.")

JOBS_RUNNING = Gauge("reft_worker_jobs", "Fine-tuning jobs that this worker runs.")
JOBS_ENDED = Counter("reft_worker_jobs_ended", "Runs of jobs by how they left this worker.", ["how"])
JOB_MEMORY = Gauge("reft_worker_memory_bytes", "Memory that this worker's jobs are reckoned to take.")
TRAINED_TOKENS = Counter("reft_worker_trained_tokens", "Tokens that this worker has trained on.")
WORKER_READY = Gauge("reft_worker_ready", "Whether this worker can take jobs.")

# Prometheus sees no increase of what was not there before, so what alerts watch begins at zero.
for _counter, _values in (
    (LOADS, ("loaded", "failed")),
    (WEBHOOKS, ("delivered", "retried", "given_up")),
    (JOBS_ENDED, ("succeeded", "failed", "cancelled", "paused", "queued", "lost", "crashed")),
):
    for _value in _values:
        _counter.labels(_value)


class BoundedNames:
    """Label values that users choose, capped: the first `cap` names keep theirs, the rest are `other`."""

    def __init__(self, cap: int) -> None:
        self._cap = cap
        self._names: set[str] = set()

    def label(self, name: str | None) -> str:
        """What metrics call this name; `none` where there is none."""
        if name is None:
            return "none"
        if name not in self._names:
            if len(self._names) >= self._cap:
                return "other"
            self._names.add(name)
        return name


class _JsonLines(logging.Formatter):
    """One JSON object per line: time, level, logger, message, the request's id and whatever `extra={"data": {...}}` has."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
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
    """Write JSON lines to stderr, ours at `level`, those of libraries from warnings on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("reft_serve").setLevel(level)
