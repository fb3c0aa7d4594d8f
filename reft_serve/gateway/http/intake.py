"""Process-wide limits of all requests together: memory, disk and turns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from reft_serve.config import GatewaySettings
from reft_serve.gateway.http.budget import Budget

__all__ = ["UPLOADS", "UPLOADS_PER_TENANT", "WAIT_SECONDS", "Intake"]

_T = TypeVar("_T")
UPLOADS = 32
"""Largest number of concurrent uploads."""
UPLOADS_PER_TENANT = 8
"""Largest number of concurrent uploads of one tenant."""
WAIT_SECONDS = 10.0
"""Time in seconds that a request waits for memory, or for its turn to be parsed."""


class Intake:
    """The budgets of a gateway process."""

    #: A body up to this size is parsed at once, in the event loop; it has memory that large ones
    #: cannot take.
    SMALL = 64 << 10
    #: How often a body is in memory: as it came, parsed, and as an engine gets it, with room for
    #: its escapes.
    COPIES = 4
    BYTES_PER_VALUE = 96

    def __init__(self, settings: GatewaySettings) -> None:
        memory = settings.max_memory_bytes
        places = settings.max_connections
        disk = settings.max_spooled_bytes
        small = memory // 4
        large = memory - small
        self._small = Budget(
            "the bytes of memory for small requests", small, small // 2, WAIT_SECONDS
        )
        self._large = Budget(
            "the bytes of memory for large requests", large, large // 2, WAIT_SECONDS
        )
        self.requests = Budget("the slots for requests", places, max(1, places // 2))
        self.uploads = Budget("the slots for uploads", UPLOADS, UPLOADS_PER_TENANT)
        self.disk = Budget("the bytes of disk for uploads", disk, disk // 2)
        self._turns = Budget("the turn to parse a large body", 1, 1, WAIT_SECONDS)

    def memory_for(self, size: int) -> Budget:
        """The memory that a body of `size` bytes counts in."""
        return self._small if size <= self.SMALL else self._large

    def is_large(self, content: bytes) -> bool:
        """True if work on these bytes would block the event loop for too long."""
        return len(content) > self.SMALL

    async def run(self, tenant: str, size: int, function: Callable[..., _T], *args: Any) -> _T:
        """Call a function whose work grows with `size` bytes: of large ones in another thread, when
        it is its turn.
        """
        if size <= self.SMALL:
            return function(*args)
        async with self.turn(tenant, _stays):
            return await asyncio.to_thread(function, *args)

    @asynccontextmanager
    async def turn(self, tenant: str, left: Callable[[], bool]) -> AsyncIterator[None]:
        """A turn to work on a large body: one at a time, tenants by turns.

        Raises:
            RateLimited: the turn did not come in time.
            ClientGone: the caller left.
        """
        lease = await self._turns.take(tenant, 1, left)
        try:
            yield
        finally:
            lease.release()


def _stays() -> bool:
    return False
