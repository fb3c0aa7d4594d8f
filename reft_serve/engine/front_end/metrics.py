"""Metrics that an engine adds to vLLM's `/metrics`: adapter slots, loads, edited tokens and
prefix-cache hits.

They are not in `observability` because importing it would register the gateway's metrics in the
engine as well.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge

__all__ = [
    "EVICTIONS",
    "FILLS",
    "PREFIX_TOKENS",
    "ROWS",
    "SLOTS",
    "SLOTS_USED",
    "STALL_SECONDS",
    "STEPS",
]

SLOTS = Gauge(
    "reft_slots", "Adapters that fit in memory at once.", ["engine"], multiprocess_mode="mostrecent"
)
SLOTS_USED = Gauge(
    "reft_slots_used", "Adapters resident in memory.", ["engine"], multiprocess_mode="mostrecent"
)
FILLS = Counter("reft_slot_fills", "Adapters written to a slot.", ["engine"])
EVICTIONS = Counter(
    "reft_slot_evictions", "Adapters evicted from their slot by another adapter.", ["engine"]
)
STALL_SECONDS = Counter(
    "reft_stall_seconds",
    "Time that the engine's loop was blocked, by cause: filling a slot or receiving a version.",
    ["engine", "cause"],
)
STEPS = Counter(
    "reft_steps",
    "Forward steps; `edited` is true if an adapter edited a token in them.",
    ["engine", "edited"],
)
ROWS = Counter("reft_rows", "Edited tokens.", ["engine"])
PREFIX_TOKENS = Counter(
    "reft_prefix_tokens",
    "Prompt tokens of finished requests, by request (base, reft, lora) and by source of their "
    "state: computed, cached in blocks shared by all adapters and the base, or cached in the "
    "adapter's own blocks.",
    ["request", "source"],
)
