"""What an engine adds to vLLM's own `/metrics`: its slots, its loads, the rows it edits, and whose cached blocks it used.

Declared here and not in `observability`, whose metrics are the gateway's and would all appear on the engine's page.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge

__all__ = ["EVICTIONS", "FILLS", "PREFIX_TOKENS", "ROWS", "SLOTS", "SLOTS_USED", "STALL_SECONDS", "STEPS"]

SLOTS = Gauge("reft_slots", "Adapters that can be resident at once.", ["engine"], multiprocess_mode="mostrecent")
SLOTS_USED = Gauge("reft_slots_used", "Adapters that are resident.", ["engine"], multiprocess_mode="mostrecent")
FILLS = Counter("reft_slot_fills", "Adapters that were written to a slot.", ["engine"])
EVICTIONS = Counter("reft_slot_evictions", "Adapters that lost their slot to another one.", ["engine"])
STALL_SECONDS = Counter(
    "reft_stall_seconds", "Time that the engine's loop was held up: by a slot's filling, by a version's arrival.",
    ["engine", "cause"],
)  # fmt: skip
STEPS = Counter("reft_steps", "Forward steps, by whether they edited any token.", ["engine", "edited"])
ROWS = Counter("reft_rows", "Edited tokens.", ["engine"])
PREFIX_TOKENS = Counter(
    "reft_prefix_tokens",
    "Prompt tokens of finished requests, by what they asked for (base, reft, lora) and where their state came from: "
    "computed, or cached in blocks that all adapters and the base share, or in blocks of the adapter's own.",
    ["request", "source"],
)
