"""Usage of a request whose caller left before the end: the engine's count, or an estimate."""

from __future__ import annotations

import asyncio

from reft_serve.gateway.accounting.demand import Demand
from reft_serve.gateway.engines.engine import Engine
from reft_serve.gateway.engines.tokens import Tokens

__all__ = ["estimated", "used_until_now"]

# An engine notices within a step that its caller has left.
_LOOKS_SECONDS = (0.02, 0.1, 0.3)


def estimated(demand: Demand, seen: Tokens, seconds: float) -> Tokens:
    """At most what can have been used in this time; at least what was seen."""
    completion = seen.completion if seen.prompt or seen.completion else demand.within(seconds)
    return Tokens(seen.prompt or max(1, demand.prompt), seen.cached, completion)


async def used_until_now(engine: Engine, request_id: str) -> Tokens | None:
    """The engine's count for an aborted request; None if the engine does not report it."""
    for seconds in _LOOKS_SECONDS:
        await asyncio.sleep(seconds)
        used = await engine.usage(request_id)
        if used is not None:
            return used
    return None
