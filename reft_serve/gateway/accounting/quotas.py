"""Rate limits of tenants and keys, per minute and concurrent. Buckets are the `limits` library's,
in memory or in Redis.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from limits import RateLimitItemPerMinute, RateLimitItemPerSecond
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter, SlidingWindowCounterRateLimiter
from limits.errors import ConfigurationError, StorageError
from limits.storage import storage_from_string

from reft_serve.config import TenantLimits
from reft_serve.database.keys import Principal
from reft_serve.errors import DatabaseUnusable, RateLimited, ServiceError
from reft_serve.gateway.accounting.concurrency import (
    Concurrency,
    LocalConcurrency,
    SharedConcurrency,
)
from reft_serve.observability import LIMITED, BoundedNames

__all__ = ["Quotas", "Reservation", "limits_of"]

_log = logging.getLogger(__name__)
# A minute's requests do not all come at once: in each ten seconds a sixth of them, but at least
# ten.
_BURST_SECONDS = 10
_BURST_LEAST = 10


_MINUTE = 60
# A wall clock that falls behind the monotonic one by more than this was set back.
_SET_BACK_SECONDS = 1.0
_UNCHECKED = "usage limits cannot be checked right now; try again"


def limits_of(defaults: TenantLimits, own: Mapping[str, Any]) -> TenantLimits:
    """A tenant's limits: its own if it has some, the defaults elsewhere."""
    return defaults.merged(own)


def tighter(one: TenantLimits, other: TenantLimits) -> TenantLimits:
    """The limits of a caller bound by both."""
    both: dict[str, int | None] = {}
    for name in TenantLimits.model_fields:
        bounds = [
            value for value in (getattr(one, name), getattr(other, name)) if value is not None
        ]
        both[name] = min(bounds, default=None)
    return one.model_copy(update=both)


@dataclass(slots=True)
class Reservation:
    """Tokens reserved by one request. Call `Quotas.settle` with the actual usage."""

    estimate: int
    headers: dict[str, str] = field(default_factory=dict)
    # (limit, its bucket, when the bucket is emptied, by the monotonic clock): what was taken before
    # is not returned after.
    tokens: list[tuple[RateLimitItemPerMinute, tuple[str, str], float]] = field(
        default_factory=list
    )


class Quotas:
    """Counts requests and tokens of tenants and keys."""

    def __init__(self, defaults: TenantLimits, storage: str, names: BoundedNames) -> None:
        """Connect lazily.

        Raises:
            ServiceError: REFT_LIMITS_STORAGE cannot be used.
        """
        self._defaults = defaults
        self._names = names
        counted = _storage(storage)
        self._requests = SlidingWindowCounterRateLimiter(counted)
        self._tokens = FixedWindowRateLimiter(counted)
        self._storage = counted
        self._ahead = time.time() - time.monotonic()
        shared = isinstance(counted, RedisStorage)
        self._at_once: Concurrency = (
            SharedConcurrency(counted.bridge) if shared else LocalConcurrency()
        )

    async def close(self) -> None:
        """Stop what is done in the background."""
        await self._at_once.close()

    def limits(self, caller: Principal) -> TenantLimits:
        """Limits of the caller: the tighter one of the tenant's and the key's, for each."""
        limits = limits_of(self._defaults, caller.limits)
        return (
            tighter(limits, limits_of(TenantLimits(), caller.key_limits))
            if caller.key_limits
            else limits
        )

    @asynccontextmanager
    async def spend(self, caller: Principal, estimate: int) -> AsyncIterator[Reservation]:
        """Take a request, a place and `estimate` tokens for as long as the block lasts.

        Raises:
            RateLimited: a limit of the tenant or the key is used up; no tokens were taken then.
            DatabaseUnusable: the limits cannot be counted.
        """
        await self._watch_clock()
        holders = self._holders(caller)
        leases: list[tuple[tuple[str, str], str]] = []
        try:
            for kind, name, limits in holders:
                leases.append(
                    (
                        (kind, name),
                        await self._lease(caller, (kind, name), limits.concurrent_requests),
                    )
                )
            spending = Reservation(estimate)
            try:
                for kind, name, limits in holders:
                    await self._take(caller, (kind, name), limits, spending)
            except RateLimited as exc:
                exc.headers = dict(spending.headers)
                await self.settle(spending, 0)
                raise
            except StorageError as exc:
                raise DatabaseUnusable(_UNCHECKED) from exc
            yield spending
        finally:
            for holder, lease in leases:
                ending = self._at_once.give_back(holder, lease)
                if ending is not None:
                    await asyncio.shield(ending)

    async def _watch_clock(self) -> None:
        """Begin to count again if the clock was set back: what is counted in this process expires
        by it.
        """
        ahead = time.time() - time.monotonic()
        if ahead < self._ahead - _SET_BACK_SECONDS and isinstance(self._storage, MemoryStorage):
            _log.warning("the clock was set back, so the usage counters of limits were reset")
            await self._storage.reset()
        self._ahead = ahead

    async def _lease(self, caller: Principal, holder: tuple[str, str], most: int | None) -> str:
        lease = await self._at_once.take(holder, most)
        if lease is None:
            raise self._limited(caller, "concurrent_requests", f"{most} requests at once", 1.0)
        return lease

    async def _take(
        self,
        caller: Principal,
        holder: tuple[str, str],
        limits: TenantLimits,
        spending: Reservation,
    ) -> None:
        if limits.requests_per_minute is not None:
            await self._take_request(caller, holder, limits.requests_per_minute, spending)
        if limits.tokens_per_minute is not None:
            item = RateLimitItemPerMinute(limits.tokens_per_minute, namespace="reft-tokens")
            cost = max(1, spending.estimate)
            # A bucket must not seem to hold what was refused, not even for a moment.
            fits = await self._tokens.test(item, *holder, cost=cost)
            granted = fits and await self._tokens.hit(item, *holder, cost=cost)
            stats = await self._tokens.get_window_stats(item, *holder)
            if fits:
                spending.tokens.append(
                    (item, holder, time.monotonic() + stats.reset_time - time.time())
                )
            _add_headers(spending.headers, "tokens", item.amount, stats.remaining, stats.reset_time)
            if not granted:
                raise self._limited(
                    caller,
                    "tokens_per_minute",
                    f"{item.amount} tokens per minute",
                    _until(stats.reset_time),
                )

    async def _take_request(
        self, caller: Principal, holder: tuple[str, str], most: int, spending: Reservation
    ) -> None:
        item = RateLimitItemPerMinute(most, namespace="reft-requests")
        at_once = max(_BURST_LEAST, -(-most * _BURST_SECONDS // 60))
        burst = RateLimitItemPerSecond(at_once, _BURST_SECONDS, namespace="reft-bursts")
        if not await self._requests.hit(burst, *holder):
            stats = await self._requests.get_window_stats(burst, *holder)
            limit = f"{most} requests per minute, {at_once} of them in {_BURST_SECONDS} s,"
            raise self._limited(caller, "requests_per_minute", limit, _until(stats.reset_time))
        granted = await self._requests.hit(item, *holder)
        stats = await self._requests.get_window_stats(item, *holder)
        _add_headers(spending.headers, "requests", most, stats.remaining, stats.reset_time)
        if not granted:
            raise self._limited(
                caller,
                "requests_per_minute",
                f"{most} requests per minute",
                _until(stats.reset_time),
            )

    async def take(self, caller: Principal, what: str, most: int) -> None:
        """Count one use of something that the caller's tenant may use `most` times per minute.

        Raises:
            RateLimited: it has been used so often in the last minute.
            DatabaseUnusable: the limits cannot be counted.
        """
        await self._hit(caller, ("tenant", caller.tenant_id), what, most)

    async def take_management(self, caller: Principal) -> None:
        """Count a request that is not inference. Those of admins are not limited.

        Raises:
            RateLimited: the tenant or the key has made as many as it may in the last minute.
            DatabaseUnusable: the limits cannot be counted.
        """
        if "admin" in caller.scopes:
            return
        for kind, name, limits in self._holders(caller):
            if limits.management_requests_per_minute is not None:
                await self._hit(
                    caller,
                    (kind, name),
                    "management requests",
                    limits.management_requests_per_minute,
                )

    async def _hit(self, caller: Principal, holder: tuple[str, str], what: str, most: int) -> None:
        label = what.replace(" ", "_")
        item = RateLimitItemPerMinute(most, namespace=f"reft-{label}")
        try:
            if not await self._requests.hit(item, *holder):
                stats = await self._requests.get_window_stats(item, *holder)
                raise self._limited(
                    caller, label, f"{most} {what} per minute", _until(stats.reset_time)
                )
        except StorageError as exc:
            raise DatabaseUnusable("Usage limits cannot be checked right now; try again") from exc

    def _holders(self, caller: Principal) -> list[tuple[str, str, TenantLimits]]:
        holders = [("tenant", caller.tenant_id, limits_of(self._defaults, caller.limits))]
        holders += [
            ("key", counter, limits_of(TenantLimits(), own)) for counter, own in caller.counters
        ]
        return holders

    async def settle(self, spending: Reservation, tokens: int) -> None:
        """Replace the estimate in the buckets by the actual usage. If the minute has ended, usage
        beyond the estimate counts in the current minute. If the buckets do not respond, the
        estimate stays, so that a finished response is not lost.
        """
        difference = tokens - max(1, spending.estimate)
        for item, holder, reset in spending.tokens:
            if difference > 0 or (difference and time.monotonic() < reset):
                try:
                    await self._charge(item, item.key_for(*holder), difference)
                except StorageError:
                    _log.warning("a tenant's token count keeps its estimate", exc_info=True)
        spending.tokens.clear()

    async def _charge(self, item: RateLimitItemPerMinute, key: str, tokens: int) -> None:
        """Add to a bucket; one that holds several minutes' tokens is emptied after as many
        minutes.
        """
        held = await self._storage.incr(key, item.get_expiry(), amount=tokens)
        minutes = held // item.amount
        if tokens < 0 or minutes < 2:
            return
        if isinstance(self._storage, MemoryStorage):
            longer = time.time() + minutes * _MINUTE
            self._storage.expirations[key] = max(self._storage.expirations.get(key, 0.0), longer)
        elif isinstance(self._storage, RedisStorage):
            bridge: Any = self._storage.bridge
            try:
                await bridge.get_connection().expire(bridge.prefixed_key(key), minutes * _MINUTE)
            except bridge.base_exceptions as exc:
                raise StorageError(exc) from exc

    def _limited(self, caller: Principal, limit: str, most: str, wait: float) -> RateLimited:
        LIMITED.labels(self._names.label(caller.tenant), limit).inc()
        return RateLimited(
            f"the limit of {most} is used up; try again in {wait:.0f} s", max(wait, 1.0)
        )


def _storage(url: str) -> Any:
    try:
        return storage_from_string(url, implementation="redispy", wrap_exceptions=True)
    except (ConfigurationError, ValueError, TypeError) as exc:
        # No cause: its message holds the URL, and the URL may hold a password.
        raise ServiceError(
            f"REFT_LIMITS_STORAGE cannot be used ({type(exc).__name__}): use async+memory:// or "
            "async+redis://HOST:PORT/0"
        ) from None


def _until(moment: float) -> float:
    return max(1.0, moment - time.time())


def _add_headers(
    headers: dict[str, str], what: str, limit: int, remaining: int, reset: float
) -> None:
    """OpenAI's header names; where tenant and key both have a limit, the tighter one is
    reported.
    """
    known = headers.get(f"x-ratelimit-remaining-{what}")
    if known is None or remaining < int(known):
        headers[f"x-ratelimit-limit-{what}"] = str(limit)
        headers[f"x-ratelimit-remaining-{what}"] = str(max(0, remaining))
        headers[f"x-ratelimit-reset-{what}"] = f"{max(0.0, reset - time.time()):.3f}s"
