"""State of one inference request, and its end: usage, slots and reservations are settled once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

from reft_serve.database.keys import Principal
from reft_serve.database.models import now_ms
from reft_serve.database.resolution import Target
from reft_serve.database.usage import Ending, Opening, Status
from reft_serve.gateway.accounting.demand import Demand
from reft_serve.gateway.accounting.quotas import Reservation
from reft_serve.gateway.engines.engine import Engine
from reft_serve.gateway.engines.tokens import Tokens
from reft_serve.gateway.http.budget import Lease
from reft_serve.gateway.inference.departure import estimated, used_until_now
from reft_serve.gateway.services import Services
from reft_serve.observability import TOKENS

__all__ = ["Endpoint", "InferenceRequest", "on_disk"]

_COMMIT_SECONDS = 5.0
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One of the engine's routes."""

    name: str
    path: str
    limit_fields: tuple[str, ...] = ()
    # What is reserved if a request names no limit; `engine_default`: the engine generates no more
    # then.
    default_tokens: int = 0
    engine_default: bool = False
    typed_events: bool = False


@dataclass(slots=True)
class InferenceRequest:
    """State of one inference request."""

    services: Services
    caller: Principal
    endpoint: Endpoint
    body: dict[str, Any]
    public_model: str
    target: Target | None
    opening: Opening
    stack: AsyncExitStack
    size: int
    # What is held of the process's memory until the answer has been sent.
    leases: list[Lease]
    begun: float = field(default_factory=time.monotonic)
    spending: Reservation = field(default_factory=lambda: Reservation(0))
    # The field in which we named the limit of its length, as the caller named none.
    added: str | None = None
    demand: Demand = field(default_factory=lambda: Demand(0, 0, 1))
    engine: Engine | None = None
    engine_model: str = ""
    # When it was given to the engine, by the monotonic clock.
    delivered: float = 0.0
    settled: bool = False
    # What the line of this request in the log says beside its path.
    facts: dict[str, Any] = field(default_factory=dict)

    async def run(self, size: int, function: Callable[..., _T], *args: Any) -> _T:
        """Call a function whose work grows with `size` bytes of this request."""
        return await self.services.intake.run(self.caller.tenant_id, size, function, *args)

    async def settle(self, status: Status, tokens: Tokens) -> bool:
        """Record usage, release the slots and return whether the record is committed: False while
        the database is down, when the ledger keeps retrying. Only the first call has an effect.
        """
        if self.settled:
            return True
        self.settled = True
        services = self.services
        committed = services.ledger.settle(self.ending(status, tokens))
        services.fleet.charge(self.caller.tenant_id, tokens.work)
        if status == "completed":
            services.quarantine.clear(self.caller.tenant_id, self.endpoint.path, self.body)
        await self.stack.aclose()
        await self._count(tokens)
        return await on_disk(committed)

    async def leave(self, seen: Tokens) -> None:
        """Settle it after its caller has left: the engine's work is charged, in the queue at
        once.
        """
        if self.settled:
            return
        if not self.delivered or self.engine is None:
            await self.settle("cancelled", seen)
            return
        self.settled = True
        fleet = self.services.fleet
        tenant = self.caller.tenant_id
        # until it is known: the place that it returns goes to whoever is next
        fleet.correct(tenant, self.demand.total)
        tokens = estimated(self.demand, seen, time.monotonic() - self.delivered)
        try:
            await self.stack.aclose()
            if not seen.prompt:  # else the engine has said with each chunk what it counts
                tokens = await used_until_now(self.engine, self.opening.request_id) or tokens
        finally:
            fleet.correct(tenant, -self.demand.total)
            fleet.charge(tenant, tokens.work)
        committed = self.services.ledger.settle(self.ending("cancelled", tokens))
        await self._count(tokens)
        await on_disk(committed)

    def ending(self, status: Status, tokens: Tokens) -> Ending:
        """The request's usage record."""
        return Ending(
            self.opening, status, tokens.prompt, tokens.cached, tokens.completion, now_ms()
        )

    async def _count(self, tokens: Tokens) -> None:
        services = self.services
        self.facts |= {"prompt_tokens": tokens.prompt, "completion_tokens": tokens.completion}
        tenant = services.names.label(self.caller.tenant)
        adapter = services.names.label(
            f"{self.caller.tenant}:{self.target.label}" if self.target else None
        )
        for kind in ("prompt", "cached", "completion"):
            TOKENS.labels(tenant, adapter, kind).inc(getattr(tokens, kind))
        if self.spending.tokens:  # they may be in Redis, and the caller may leave meanwhile
            await asyncio.shield(
                services.quotas.settle(self.spending, tokens.prompt + tokens.completion)
            )


async def on_disk(committed: asyncio.Future[None]) -> bool:
    await asyncio.wait((committed,), timeout=_COMMIT_SECONDS)
    return committed.done()
