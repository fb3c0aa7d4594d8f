"""Transport of counters to an engine's metrics. Nothing is counted per token: each finished request
adds to a counter once, in the front end; the workers keep plain numbers, which the front end polls
every few seconds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from reft_serve.engine.adapter_ref import adapter_ref
from reft_serve.engine.core.prefix_cache import shared_tokens
from reft_serve.engine.front_end.metrics import (
    EVICTIONS,
    FILLS,
    PREFIX_TOKENS,
    ROWS,
    SLOTS,
    SLOTS_USED,
    STALL_SECONDS,
    STEPS,
)

__all__ = ["take", "wrap_run_output_handler", "wrap_update_stats_from_finished"]

_log = logging.getLogger("vllm.reft_serve")
_SECONDS = 5.0
_block_sizes: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # by output processor


def wrap_update_stats_from_finished(original: Any) -> Callable[..., None]:
    """Around `OutputProcessor._update_stats_from_finished`, which every request with statistics
    ends in.
    """

    def update(self: Any, req_state: Any, finish_reason: Any, iteration_stats: Any) -> None:
        original(self, req_state, finish_reason, iteration_stats)
        block = _block_sizes.get(self)
        if iteration_stats is not None and block is not None:
            _count_prefix(req_state, block)

    return update


def _count_prefix(state: Any, block: int) -> None:
    request = state.lora_request
    cached = state.num_cached_tokens
    identity = adapter_ref(request)
    if identity is not None:
        kind = "reft"
        shared = shared_tokens(identity, state.prompt_len, cached, block)
    else:
        kind, shared = ("base", cached) if request is None else ("lora", 0)
    for source, tokens in (
        ("computed", state.prompt_len - cached),
        ("shared", shared),
        ("own", cached - shared),
    ):
        if tokens > 0:  # a counter refuses less, and that would end the engine's loop
            PREFIX_TOKENS.labels(kind, source).inc(tokens)


def wrap_run_output_handler(original: Any) -> Callable[..., None]:
    """Around `AsyncLLM._run_output_handler`, which runs once in the event loop of a front end.

    Of several front ends of one engine the first asks: counters of all of them are added up.
    """

    def run(self: Any) -> None:
        begins = self.output_handler is None
        original(self)
        _block_sizes[self.output_processor] = self.vllm_config.cache_config.block_size
        core = self.engine_core
        if (
            begins
            and self.log_stats
            and self.vllm_config.lora_config is not None
            and core.client_index == 0
        ):
            task = asyncio.create_task(_sample_forever(core), name="reft-telemetry")
            # Which keeps the task as well, of which the loop has a weak reference only.
            self.output_handler.add_done_callback(lambda _: task.cancel())

    return run


async def _sample_forever(core: Any) -> None:
    last: dict[int, Mapping[str, float]] = {}
    while True:
        try:
            answers = await core.call_utility_all_async(
                "collective_rpc", "reft_counters", None, (), {}
            )
            for number, ranks in enumerate(answers):
                # Ranks do the same work in step, each on its layers: the one that did most speaks
                # for the engine.
                now = {name: max(rank.get(name, 0) for rank in ranks) for name in ranks[0]}
                take(str(number), now, last.get(number, {}))
                last[number] = now
        except Exception as exc:  # an engine that is dying says so elsewhere
            _log.debug("the workers' counters could not be read: %s", exc)
        await asyncio.sleep(_SECONDS)


def take(engine: str, now: Mapping[str, float], before: Mapping[str, float]) -> None:
    """Add to an engine's metrics the increase of its workers' counters."""
    if not now:
        return
    SLOTS.labels(engine).set(now["slots"])
    SLOTS_USED.labels(engine).set(now["resident"])
    since = {name: max(value - before.get(name, 0), 0) for name, value in now.items()}
    FILLS.labels(engine).inc(since["loads"])
    EVICTIONS.labels(engine).inc(since["evictions"])
    STALL_SECONDS.labels(engine, "slot").inc(since["load_seconds"])
    STALL_SECONDS.labels(engine, "arrival").inc(since["hold_seconds"])
    STEPS.labels(engine, "yes").inc(since["steps_with_rows"])
    STEPS.labels(engine, "no").inc(max(since["steps"] - since["steps_with_rows"], 0))
    ROWS.labels(engine).inc(since["rows"])
