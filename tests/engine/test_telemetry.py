"""What an engine counts of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from vllm.lora.request import LoRARequest

from reft_serve.engine.adapter_ref import AdapterRef, bound_request
from reft_serve.engine.core.prefix_cache import extra_keys, shared_tokens
from reft_serve.engine.front_end import telemetry
from reft_serve.engine.front_end.telemetry import take, wrap_update_stats_from_finished
from reft_serve.interventions.positions import PositionRule
from tests.support.engine.position_rules import RULES

DIGEST = "0" * 64


@dataclass
class _Request:
    """As much of a request as a cache key or a count needs."""

    lora_request: LoRARequest | None
    num_prompt_tokens: int = 0
    prompt_len: int = 0
    num_cached_tokens: int = 0


@given(
    rule=RULES, prompt_len=st.integers(1, 90), block=st.integers(1, 16), blocks=st.integers(0, 90),
    strength=st.sampled_from([1.0, 0.5, 0.0]), lora=st.booleans(),
)  # fmt: skip
def test_shared_tokens_are_those_of_the_first_blocks_without_a_key(
    rule: PositionRule, prompt_len: int, block: int, blocks: int, strength: float, lora: bool
) -> None:
    identity = AdapterRef(DIGEST, rule, lora, strength)
    request: Any = _Request(bound_request(LoRARequest("a", 1, "/a"), "/a", identity), prompt_len)
    cached = min(blocks, prompt_len // block) * block
    shared = 0
    for start in range(0, cached, block):
        if extra_keys(request, start, start + block):
            break
        shared = start + block
    assert shared_tokens(identity, prompt_len, cached, block) == shared


@pytest.fixture
def counted() -> Any:
    """What `wrap_update_stats_from_finished` added for a request, by (request, source)."""
    kinds = [
        (kind, source)
        for kind in ("base", "reft", "lora")
        for source in ("computed", "shared", "own")
    ]

    def totals() -> dict[tuple[str, str], float]:
        return {
            (kind, source): REGISTRY.get_sample_value(
                "reft_prefix_tokens_total", {"request": kind, "source": source}
            ) or 0.0
            for kind, source in kinds
        }  # fmt: skip

    before = totals()
    return lambda: {key: now - before[key] for key, now in totals().items() if now != before[key]}


class _Processor:
    def __init__(self, block: int) -> None:
        telemetry._block_sizes[self] = block


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (None, {("base", "computed"): 18, ("base", "shared"): 32}),
        (LoRARequest("l", 1, "/l"), {("lora", "computed"): 18, ("lora", "own"): 32}),
        (
            AdapterRef(DIGEST, PositionRule("l4")),
            {("reft", "computed"): 18, ("reft", "shared"): 32},
        ),
        (AdapterRef(DIGEST, PositionRule("f4")), {("reft", "computed"): 18, ("reft", "own"): 32}),
        # The 20th token is in the second block of 16: the first is everybody's, the second the adapter's.
        (
            AdapterRef(DIGEST, PositionRule("20")),
            {("reft", "computed"): 18, ("reft", "shared"): 16, ("reft", "own"): 16},
        ),
    ],
)
def test_prompt_tokens_are_counted_by_whose_blocks_they_came_from(
    counted: Any, request_: LoRARequest | AdapterRef | None, expected: dict[tuple[str, str], int]
) -> None:
    if isinstance(request_, AdapterRef):
        request_ = bound_request(LoRARequest("a", 1, "/a"), "/a", request_)
    update = wrap_update_stats_from_finished(lambda *_: None)
    state = _Request(request_, prompt_len=50, num_cached_tokens=32)
    update(_Processor(16), state, "stop", None)  # statistics are off
    assert counted() == {}
    update(_Processor(16), state, "stop", object())
    assert counted() == expected


def test_counters_rise_by_what_the_workers_counted_since_and_gauges_show_the_last() -> None:
    first = {
        "slots": 8.0, "resident": 3.0, "loads": 5.0, "evictions": 2.0, "load_seconds": 0.5, "hold_seconds": 0.25,
        "steps": 100.0, "steps_with_rows": 40.0, "rows": 400.0,
    }  # fmt: skip
    take("7", first, {})
    take(
        "7",
        first | {"resident": 2.0, "steps": 110.0, "steps_with_rows": 43.0, "rows": 412.0},
        first,
    )
    take("7", {}, first)  # an engine without adapters counts nothing

    def value(name: str, **labels: str) -> float | None:
        return REGISTRY.get_sample_value(name, {"engine": "7"} | labels)

    assert (value("reft_slots"), value("reft_slots_used")) == (8, 2)
    assert (value("reft_slot_fills_total"), value("reft_slot_evictions_total")) == (5, 2)
    assert (value("reft_steps_total", edited="yes"), value("reft_steps_total", edited="no")) == (
        43,
        67,
    )
    assert value("reft_rows_total") == 412
    assert [value("reft_stall_seconds_total", cause=cause) for cause in ("slot", "arrival")] == [
        0.5,
        0.25,
    ]
