"""Budgets of memory, disk and places that all requests of the process share, fair between tenants.

No tenant gets more than its share. A request that does not fit waits, tenants take turns, and after
a while it is refused.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from reft_serve.errors import RateLimited, RequestTooLarge
from reft_serve.gateway.http.streaming import ClientGone

__all__ = ["Budget", "Lease"]

# How soon it is seen that the caller of a waiting request has left.
_LOOK_SECONDS = 0.5


@dataclass(slots=True, eq=False)
class _Waiter:
    amount: int
    turn: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


@dataclass(slots=True, eq=False)
class Lease:
    """A part of a budget, held until `release`."""

    budget: Budget
    tenant: str
    amount: int

    def grow(self, amount: int) -> None:
        """Take more of the same budget.

        Raises:
            RateLimited: it does not fit now.
        """
        self.budget.check(self.tenant, amount)
        self.amount += amount

    def shrink(self, amount: int) -> None:
        """Give all but `amount` back."""
        if amount < self.amount:
            self.budget.give(self.tenant, self.amount - amount)
            self.amount = amount

    def release(self) -> None:
        """Give it back. Later calls do nothing."""
        self.shrink(0)


class Budget:
    """An amount that requests share."""

    def __init__(self, what: str, total: int, share: int, wait_seconds: float = 0.0) -> None:
        """Begin with nothing taken.

        Args:
            what: what is shared, for the sentence of a refusal.
            total: what all tenants have together.
            share: the most that one tenant has.
            wait_seconds: how long a request may wait for its part.
        """
        self.total = total
        self.share = share
        self._what = what
        self._wait_seconds = wait_seconds
        self._used = 0
        self._used_by: Counter[str] = Counter()
        self._waiters: OrderedDict[str, deque[_Waiter]] = OrderedDict()

    @property
    def used(self) -> int:
        """Amount in use."""
        return self._used

    async def take(self, tenant: str, amount: int, left: Callable[[], bool]) -> Lease:
        """Take a part, as soon as there is room.

        Args:
            tenant: the owner.
            amount: how much.
            left: whether the caller has closed its connection; asked again and again.

        Raises:
            RequestTooLarge: it is more than a tenant can ever have.
            RateLimited: there was no room in time.
            ClientGone: the caller left.
        """
        if amount > self.share:
            raise RequestTooLarge(
                f"the request needs {amount} of {self._what}; a tenant has at most {self.share} "
                "at once"
            )
        if tenant in self._waiters or not self._fits(tenant, amount):
            await self._wait(tenant, amount, left)
        else:
            self._take(tenant, amount)
        return Lease(self, tenant, amount)

    def check(self, tenant: str, amount: int) -> None:
        """Take a part now.

        Raises:
            RateLimited: there is no room.
        """
        if not self._fits(tenant, amount):
            raise self._full()
        self._take(tenant, amount)

    def give(self, tenant: str, amount: int) -> None:
        """Return an amount, and admit the waiting requests that now fit."""
        self._used -= amount
        self._used_by[tenant] -= amount
        if not self._used_by[tenant]:
            del self._used_by[tenant]
        if self._waiters:
            self._admit()

    def _fits(self, tenant: str, amount: int) -> bool:
        return self._used + amount <= self.total and self._used_by[tenant] + amount <= self.share

    def _take(self, tenant: str, amount: int) -> None:
        self._used += amount
        self._used_by[tenant] += amount

    def _full(self) -> RateLimited:
        return RateLimited(f"other requests hold {self._what} at the moment; try again", 1.0)

    async def _wait(self, tenant: str, amount: int, left: Callable[[], bool]) -> None:
        waiter = _Waiter(amount)
        self._waiters.setdefault(tenant, deque()).append(waiter)
        ends = time.monotonic() + self._wait_seconds
        try:
            while not waiter.turn.done():
                if left():
                    raise ClientGone
                rest = ends - time.monotonic()
                if rest <= 0:
                    raise self._full()
                await asyncio.wait((waiter.turn,), timeout=min(rest, _LOOK_SECONDS))
        except BaseException:
            if waiter.turn.done():
                self.give(tenant, amount)
            else:
                self._withdraw(tenant, waiter)
            raise

    def _withdraw(self, tenant: str, waiter: _Waiter) -> None:
        queue = self._waiters[tenant]
        queue.remove(waiter)
        if not queue:
            del self._waiters[tenant]
        self._admit()

    def _admit(self) -> None:
        """Admit waiting requests, tenant by tenant, while the first request of any tenant fits."""
        moved = True
        while moved:
            moved = False
            for tenant in list(self._waiters):
                queue = self._waiters[tenant]
                if not self._fits(tenant, queue[0].amount):
                    continue
                waiter = queue.popleft()
                self._take(tenant, waiter.amount)
                waiter.turn.set_result(None)
                moved = True
                if queue:
                    self._waiters.move_to_end(tenant)
                else:
                    del self._waiters[tenant]
