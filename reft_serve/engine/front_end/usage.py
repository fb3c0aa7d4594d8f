"""Usage of requests by the id that the gateway assigned: the gateway asks for requests whose
callers have left.

Nothing is counted per token: a request is noted once, when it ends or is aborted.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakSet

from fastapi import APIRouter, HTTPException

__all__ = [
    "ENTRIES",
    "add_route",
    "usage_of",
    "wrap_abort_requests",
    "wrap_serving_init",
    "wrap_update_stats_from_finished",
]

ENTRIES = 10_000
# The gateway's own ids, within vLLM's names of completions, chats, responses, their prompts and
# choices.
_ID = re.compile(r"(?:req|resp)_([0-9a-f]{32})")
_noted: WeakSet[Any] = WeakSet()  # the states of requests that are counted in `_used`
_used: OrderedDict[str, dict[str, int]] = OrderedDict()


def wrap_update_stats_from_finished(original: Any) -> Callable[..., None]:
    """Around `OutputProcessor._update_stats_from_finished`."""

    def update(self: Any, req_state: Any, *args: Any, **kwargs: Any) -> None:
        original(self, req_state, *args, **kwargs)
        _note(req_state)

    return update


def wrap_abort_requests(original: Any) -> Callable[..., list[str]]:
    """Around `OutputProcessor.abort_requests`, which calls itself for the choices of a request."""

    def abort_requests(
        self: Any, request_ids: Iterable[str], *args: Any, **kwargs: Any
    ) -> list[str]:
        states = self.request_states.copy()
        aborted: list[str] = original(self, request_ids, *args, **kwargs)
        for request_id in aborted:
            if request_id in states:
                _note(states[request_id])
        return aborted

    return abort_requests


def wrap_serving_init(original: Any) -> Callable[..., None]:
    """Around `__init__` of the serving classes: usage says how many tokens of the prompt were
    cached, without a flag.
    """

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.enable_prompt_tokens_details = True

    return init


def _note(state: Any) -> None:
    match = _ID.search(state.external_req_id or state.request_id)
    if match is None or state in _noted:
        return
    _noted.add(state)
    first = not state.parent_req or not state.request_index  # the choices of a prompt share it
    generated = state.detokenizer.num_output_tokens() if state.detokenizer is not None else 0
    used = _used.pop(match[1], None) or dict.fromkeys(
        ("prompt_tokens", "cached_tokens", "completion_tokens"), 0
    )
    used["prompt_tokens"] += state.prompt_len * first
    used["cached_tokens"] += max(0, state.num_cached_tokens) * first
    used["completion_tokens"] += generated
    _used[match[1]] = used
    if len(_used) > ENTRIES:
        _used.popitem(last=False)


def usage_of(request_id: str) -> dict[str, int] | None:
    """Usage of a request, over all of its prompts and choices that have ended."""
    match = _ID.fullmatch(request_id)
    return _used.get(match[1]) if match else None


def add_route(router: APIRouter) -> None:
    """Add the route `/v1/reft/usage/ID` to the API server, protected by its --api-key."""

    async def usage(request_id: str) -> dict[str, int]:
        used = usage_of(request_id)
        if used is None:
            raise HTTPException(404, "no request with this id ended recently")
        return used

    router.add_api_route(
        "/v1/reft/usage/{request_id}", usage, methods=["GET"], include_in_schema=False
    )
