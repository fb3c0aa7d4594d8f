"""What a request has used whose caller left before the end: by the engine's own count, or by an estimate."""

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
    """What the engine counted for a request that it has been made to abort; None if it does not say."""
    for seconds in _LOOKS_SECONDS:
        await asyncio.sleep(seconds)
        used = await engine.usage(request_id)
        if used is not None:
            return used
    return None
