"""Requests that are in progress at once: counted in this process, or in Redis for all gateways
together.

In Redis each request holds a lease, which its gateway renews. The leases of a gateway that dies
expire. While Redis does not answer, each gateway counts its own.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any, Protocol

__all__ = ["LEASE_SECONDS", "Concurrency", "LocalConcurrency", "SharedConcurrency"]

_log = logging.getLogger(__name__)
LEASE_SECONDS = 30
_Holder = tuple[str, str]
# Redis's own clock: gateways' clocks may differ.
_NOW = "local t = redis.call('TIME'); local now = t[1] * 1000 + math.floor(t[2] / 1000); "
_TAKE = (
    _NOW
    + "redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now); if redis.call('ZCARD', KEYS[1]) >= "
    "tonumber(ARGV[1]) then return 0 end; redis.call('ZADD', KEYS[1], now + ARGV[2], "
    "ARGV[3]); redis.call('PEXPIRE', KEYS[1], ARGV[2]); return 1"
)
_RENEW = (
    _NOW + "for i = 2, #ARGV do redis.call('ZADD', KEYS[1], 'XX', now + ARGV[1], ARGV[i]) end; "
    "redis.call('PEXPIRE', KEYS[1], ARGV[1]); return 1"
)


class Concurrency(Protocol):
    """Counts what each holder, a tenant or a key, has in progress."""

    async def take(self, holder: _Holder, most: int | None) -> str | None:
        """A lease, to be returned; None if the holder has `most` already."""

    def give_back(self, holder: _Holder, lease: str) -> Awaitable[None] | None:
        """End a lease; what it returns, if anything, is to be awaited."""

    async def close(self) -> None:
        """Stop renewing leases."""


class LocalConcurrency:
    def __init__(self) -> None:
        self._counts: Counter[_Holder] = Counter()

    async def take(self, holder: _Holder, most: int | None) -> str | None:
        """As the protocol says."""
        if most is not None and self._counts[holder] >= most:
            return None
        self._counts[holder] += 1
        return ""

    def give_back(self, holder: _Holder, lease: str) -> None:
        """As the protocol says."""
        self._counts[holder] -= 1
        if not self._counts[holder]:
            del self._counts[holder]

    async def close(self) -> None:
        pass


class SharedConcurrency:
    """Of all gateways that count in one Redis."""

    def __init__(self, bridge: Any) -> None:
        """Connect lazily.

        Args:
            bridge: of a Redis storage of the `limits` library.
        """
        self._bridge = bridge
        self._local = LocalConcurrency()
        self._silent_until = 0.0
        self._held: dict[str, _Holder] = {}
        self._renewing: asyncio.Task[None] | None = None

    async def take(self, holder: _Holder, most: int | None) -> str | None:
        """As the protocol says."""
        if await self._local.take(holder, most) is None:
            return None
        if most is None:
            return ""
        lease = secrets.token_hex(12)
        granted = False
        try:
            granted = bool(await self._run(_TAKE, holder, most, LEASE_SECONDS * 1000, lease))
        except self._bridge.base_exceptions as exc:
            self._warn("concurrent requests are counted per gateway only", exc)
            granted = True
        finally:
            if not granted:
                self._local.give_back(holder, "")
        if not granted:
            return None
        self._held[lease] = holder
        if self._renewing is None:
            self._renewing = asyncio.create_task(self._renew_forever())
        return lease

    def give_back(self, holder: _Holder, lease: str) -> Awaitable[None] | None:
        """As the protocol says; a lease that cannot be ended expires."""
        self._local.give_back(holder, lease)
        return self._end(holder, lease) if self._held.pop(lease, None) is not None else None

    async def _end(self, holder: _Holder, lease: str) -> None:
        try:
            await self._bridge.get_connection().zrem(self._key(holder), lease)
        except self._bridge.base_exceptions as exc:
            self._warn("a request's slot will be released when its lease expires", exc)

    def _warn(self, message: str, exc: BaseException) -> None:
        """Once in a while: it is so of every request."""
        if time.monotonic() > self._silent_until:
            self._silent_until = time.monotonic() + LEASE_SECONDS
            _log.warning(message, extra={"data": {"reason": str(exc)}})

    async def close(self) -> None:
        """As the protocol says."""
        if self._renewing is not None:
            self._renewing.cancel()
            with suppress(asyncio.CancelledError):
                await self._renewing

    async def _renew_forever(self) -> None:
        while True:
            await asyncio.sleep(LEASE_SECONDS / 3)
            holders: dict[_Holder, list[str]] = {}
            for lease, holder in self._held.items():
                holders.setdefault(holder, []).append(lease)
            try:
                for holder, leases in holders.items():
                    await self._run(_RENEW, holder, LEASE_SECONDS * 1000, *leases)
            except self._bridge.base_exceptions as exc:
                self._warn("leases of concurrent-request slots cannot be renewed", exc)

    async def _run(self, script: str, holder: _Holder, *args: Any) -> int:
        return int(await self._bridge.get_connection().eval(script, 1, self._key(holder), *args))

    def _key(self, holder: _Holder) -> str:
        return str(self._bridge.prefixed_key("/".join(("reft-at-once", *holder))))
