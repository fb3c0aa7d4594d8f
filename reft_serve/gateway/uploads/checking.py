"""The places in which uploads are checked: few in a process, one for a tenant, given in turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Receive

from reft_serve.errors import RateLimited, RequestInvalid
from reft_serve.gateway.http.streaming import ClientGone, while_there

__all__ = [
    "CHECKS_AT_ONCE",
    "CHECKS_PER_TENANT",
    "CHECKS_WAITING_PER_TENANT",
    "CheckPlaces",
    "checking_for",
]

CHECKS_AT_ONCE = 3
CHECKS_PER_TENANT = 1
CHECKS_WAITING_PER_TENANT = 16
_RETRY_SECONDS = 5.0


class CheckPlaces:
    """Each place is for one process, which takes a core for as long as it lasts."""

    def __init__(self, at_once: int = CHECKS_AT_ONCE) -> None:
        self._free = at_once
        self._running: dict[str, int] = {}
        self._waiting: dict[str, list[asyncio.Future[None]]] = {}
        self._last_served: dict[str, int] = {}
        self._turn = 0

    @asynccontextmanager
    async def place(self, tenant_id: str) -> AsyncIterator[None]:
        """A place for a check of this tenant.

        Raises:
            RateLimited: too many of its checks wait.
        """
        await self._enter(tenant_id)
        try:
            yield
        finally:
            self._leave(tenant_id)

    async def _enter(self, tenant_id: str) -> None:
        waiting = self._waiting.setdefault(tenant_id, [])
        if len(waiting) >= CHECKS_WAITING_PER_TENANT:
            raise RateLimited(
                f"{CHECKS_WAITING_PER_TENANT} uploads are waiting to be checked; upload again "
                "later",
                _RETRY_SECONDS,
            )
        mine = asyncio.get_running_loop().create_future()
        waiting.append(mine)
        self._give()
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():
                self._leave(tenant_id)
            else:
                self._forget(tenant_id, mine)
            raise

    def _leave(self, tenant_id: str) -> None:
        self._free += 1
        self._running[tenant_id] -= 1
        if not self._running[tenant_id]:
            del self._running[tenant_id]
        self._give()

    def _give(self) -> None:
        while self._free:
            able = [
                tenant
                for tenant in self._waiting
                if self._running.get(tenant, 0) < CHECKS_PER_TENANT
            ]
            if not able:
                break
            tenant = min(able, key=lambda each: self._last_served.get(each, 0))
            mine = self._waiting[tenant][0]
            self._forget(tenant, mine)
            if mine.done():  # its caller has left
                continue
            self._turn += 1
            self._last_served[tenant] = self._turn
            self._free -= 1
            self._running[tenant] = self._running.get(tenant, 0) + 1
            mine.set_result(None)
        if not self._waiting and not self._running:
            self._last_served.clear()

    def _forget(self, tenant_id: str, mine: asyncio.Future[None]) -> None:
        waiting = self._waiting.get(tenant_id, [])
        if mine in waiting:
            waiting.remove(mine)
        if not waiting:
            self._waiting.pop(tenant_id, None)


@asynccontextmanager
async def checking_for(
    places: CheckPlaces, tenant_id: str, receive: Receive
) -> AsyncIterator[None]:
    """A place, for as long as the caller is there; when it leaves, what is done in the place is
    cancelled.

    Raises:
        RateLimited: too many of the tenant's checks wait.
        RequestInvalid: the caller left.
    """
    try:
        async with while_there(receive), places.place(tenant_id):
            yield
    except ClientGone as exc:
        raise RequestInvalid("the client closed the connection") from exc
