"""What a tenant and a key may use per minute and at once. Buckets are the `limits` library's, in memory or in Redis."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from limits import RateLimitItemPerMinute, RateLimitItemPerSecond
from limits.aio.strategies import FixedWindowRateLimiter, SlidingWindowCounterRateLimiter
from limits.errors import StorageError
from limits.storage import storage_from_string

from reft_serve.config import TenantLimits
from reft_serve.database.keys import Principal
from reft_serve.errors import DatabaseUnusable, RateLimited
from reft_serve.observability import LIMITED, BoundedNames

__all__ = ["Quotas", "Spending", "limits_of"]

_log = logging.getLogger(__name__)
# A minute's requests do not all come at once: in each ten seconds a sixth of them, but at least ten.
_BURST_SECONDS, _BURST_LEAST = 10, 10


def limits_of(defaults: TenantLimits, own: Mapping[str, Any]) -> TenantLimits:
    """A tenant's limits: its own where it has some, the defaults elsewhere."""
    return defaults.merged(own)


@dataclass(slots=True)
class Spending:
    """What one request has taken. Call `Quotas.settle` with what it came to."""

    estimate: int
    headers: dict[str, str] = field(default_factory=dict)
    # (limit, its bucket, when the bucket is emptied): what was taken before is not given back after.
    tokens: list[tuple[RateLimitItemPerMinute, tuple[str, str], float]] = field(default_factory=list)


class Quotas:
    """Counts requests and tokens of tenants and keys."""

    def __init__(self, defaults: TenantLimits, storage: str, names: BoundedNames) -> None:
        self._defaults, self._names = defaults, names
        counted: Any = storage_from_string(storage, implementation="redispy", wrap_exceptions=True)
        self._requests = SlidingWindowCounterRateLimiter(counted)
        self._tokens = FixedWindowRateLimiter(counted)
        self._storage = counted
        self._at_once: Counter[tuple[str, str]] = Counter()

    def limits(self, caller: Principal) -> TenantLimits:
        """What the caller's tenant may use."""
        return limits_of(self._defaults, caller.limits)

    @asynccontextmanager
    async def spend(self, caller: Principal, estimate: int) -> AsyncIterator[Spending]:
        """Take a request, a place and `estimate` tokens for as long as the block lasts.

        Raises:
            RateLimited: a limit of the tenant or the key is used up; no tokens were taken then.
            DatabaseUnusable: the limits cannot be counted.
        """
        holders = [("tenant", caller.tenant_id, self.limits(caller))]
        if caller.key_limits:
            holders.append(("key", caller.key_id, limits_of(TenantLimits(), caller.key_limits)))
        taken: list[tuple[str, str]] = []
        try:
            for kind, name, limits in holders:
                self._check_at_once(caller, (kind, name), limits, taken)
            spending = Spending(estimate)
            try:
                for kind, name, limits in holders:
                    await self._take(caller, (kind, name), limits, spending)
            except RateLimited:
                await self.settle(spending, 0)
                raise
            except StorageError as exc:
                raise DatabaseUnusable("what is used of the limits cannot be counted; try again") from exc
            yield spending
        finally:
            for holder in taken:
                self._at_once[holder] -= 1
                if not self._at_once[holder]:
                    del self._at_once[holder]

    def _check_at_once(
        self, caller: Principal, holder: tuple[str, str], limits: TenantLimits, taken: list[tuple[str, str]]
    ) -> None:
        most = limits.concurrent_requests
        if most is not None and self._at_once[holder] >= most:
            raise self._limited(caller, "concurrent_requests", f"{most} requests at once", 1.0)
        self._at_once[holder] += 1
        taken.append(holder)

    async def _take(self, caller: Principal, holder: tuple[str, str], limits: TenantLimits, spending: Spending) -> None:
        if limits.requests_per_minute is not None:
            await self._take_request(caller, holder, limits.requests_per_minute, spending)
        if limits.tokens_per_minute is not None:
            item = RateLimitItemPerMinute(limits.tokens_per_minute, namespace="reft-tokens")
            granted = await self._tokens.hit(item, *holder, cost=max(1, spending.estimate))
            stats = await self._tokens.get_window_stats(item, *holder)
            spending.tokens.append((item, holder, stats.reset_time))
            if not granted:
                raise self._limited(
                    caller, "tokens_per_minute", f"{item.amount} tokens per minute", _until(stats.reset_time)
                )
            _tell(spending.headers, "tokens", item.amount, stats.remaining, stats.reset_time)

    async def _take_request(self, caller: Principal, holder: tuple[str, str], most: int, spending: Spending) -> None:
        item = RateLimitItemPerMinute(most, namespace="reft-requests")
        at_once = max(_BURST_LEAST, -(-most * _BURST_SECONDS // 60))
        burst = RateLimitItemPerSecond(at_once, _BURST_SECONDS, namespace="reft-bursts")
        if not await self._requests.hit(burst, *holder):
            stats = await self._requests.get_window_stats(burst, *holder)
            told = f"{most} requests per minute, which lets {at_once} through in {_BURST_SECONDS} s,"
            raise self._limited(caller, "requests_per_minute", told, _until(stats.reset_time))
        granted = await self._requests.hit(item, *holder)
        stats = await self._requests.get_window_stats(item, *holder)
        _tell(spending.headers, "requests", most, stats.remaining, stats.reset_time)
        if not granted:
            raise self._limited(caller, "requests_per_minute", f"{most} requests per minute", _until(stats.reset_time))

    async def take(self, caller: Principal, what: str, most: int) -> None:
        """Count one use of something that the caller's tenant may use `most` times per minute.

        Raises:
            RateLimited: it has been used so often in the last minute.
            DatabaseUnusable: the limits cannot be counted.
        """
        item = RateLimitItemPerMinute(most, namespace=f"reft-{what}")
        holder = ("tenant", caller.tenant_id)
        try:
            if not await self._requests.hit(item, *holder):
                stats = await self._requests.get_window_stats(item, *holder)
                raise self._limited(
                    caller, what.replace(" ", "_"), f"{most} {what} per minute", _until(stats.reset_time)
                )
        except StorageError as exc:
            raise DatabaseUnusable("Usage limits cannot be checked right now; try again") from exc

    async def settle(self, spending: Spending, tokens: int) -> None:
        """Let the buckets hold what was used instead of what was estimated. Where they do not answer the estimate stays: an
        answer that is there must not be lost for it.
        """
        difference = tokens - max(1, spending.estimate)
        for item, holder, reset in spending.tokens:
            if difference and time.time() < reset:
                try:
                    await self._storage.incr(item.key_for(*holder), item.get_expiry(), amount=difference)
                except StorageError:
                    _log.warning("a tenant's tokens stay as they were estimated", exc_info=True)
        spending.tokens.clear()

    def _limited(self, caller: Principal, limit: str, most: str, wait: float) -> RateLimited:
        LIMITED.labels(self._names.label(caller.tenant), limit).inc()
        return RateLimited(f"the limit of {most} is used up; try again in {wait:.0f} s", max(wait, 1.0))


def _until(moment: float) -> float:
    return max(1.0, moment - time.time())


def _tell(headers: dict[str, str], what: str, limit: int, remaining: int, reset: float) -> None:
    """OpenAI's header names; where tenant and key both have a limit, the tighter one is told."""
    known = headers.get(f"x-ratelimit-remaining-{what}")
    if known is None or remaining < int(known):
        headers[f"x-ratelimit-limit-{what}"] = str(limit)
        headers[f"x-ratelimit-remaining-{what}"] = str(max(0, remaining))
        headers[f"x-ratelimit-reset-{what}"] = f"{max(0.0, reset - time.time()):.3f}s"
