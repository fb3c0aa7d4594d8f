"""A job's lease: renewed, polled for the owner's wishes, and released in time if the database is
down. No torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

from reft_serve.database.connection import FAILURES, Database
from reft_serve.database.jobs import claimed
from reft_serve.database.jobs.claimed import Progress
from reft_serve.database.jobs.outcomes import Level, Wanted
from reft_serve.database.jobs.queue import Claim
from reft_serve.errors import LeaseLost
from reft_serve.training.jobs.context import retry_until

__all__ = ["Lease"]

T = TypeVar("T")
_POLL_SECONDS = 0.2
_SHORTEST_POLL = 0.03
_EVENT_SECONDS = 0.5
_MARGIN = 0.85


class Lease:
    """A worker's lease of a job. All writes for the job go through here or through `write`.

    Args:
        database: where the job is.
        claim: the job.
        seconds: of the lease.
        claimed: the time (`time.monotonic`) just before it was claimed.
    """

    def __init__(self, database: Database, claim: Claim, seconds: float, claimed: float) -> None:
        self._database = database
        self._claim = claim
        self._seconds = seconds
        self._renewed = claimed
        self._heartbeat_lock = asyncio.Lock()
        self._woken = asyncio.Event()
        self._woken_at = 0.0
        self._events: list[tuple[str, Level, dict[str, float] | None]] = []
        self.progress: Progress | None = None
        self.wanted: Wanted = "none"

    def until(self) -> float:
        """Time (`time.monotonic`) at which the job must be released, unless the lease is renewed
        before.
        """
        return self._renewed + self._seconds * _MARGIN

    def queue_event(
        self, message: str, level: Level = "info", metrics: dict[str, float] | None = None
    ) -> None:
        """Queue an event for the job's owner; it is sent with the next heartbeat."""
        self._events.append((message, level, metrics))

    def wake(self) -> None:
        """Look now what the job's owner wants, unless that was done a moment ago."""
        if time.monotonic() - self._woken_at > _SHORTEST_POLL:
            self._woken_at = time.monotonic()
            self._woken.set()

    async def keep(self, heard: Callable[[Wanted], None]) -> None:
        """Renew the lease until it is lost, and pass each change of the owner's wish to `heard`.

        Raises:
            LeaseLost: it is another's, or may be soon.
        """
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), _POLL_SECONDS)
            self._woken.clear()
            age = time.monotonic() - self._renewed
            due = age > self._seconds / 4 or (bool(self._events) and age > _EVENT_SECONDS)
            try:
                async with asyncio.timeout(max(0.1, self.until() - time.monotonic())):
                    wanted = await (self.heartbeat() if due else self._poll())
            except FAILURES as exc:
                if time.monotonic() > self.until():
                    raise LeaseLost(
                        f"the database was unreachable for too long to keep job {self._claim.id}"
                    ) from exc
                continue
            if wanted != self.wanted:
                self.wanted = wanted
                heard(wanted)

    async def heartbeat(self) -> Wanted:
        """Renew the lease, and send the queued events."""
        job = self._claim.id
        worker = self._claim.worker
        async with self._heartbeat_lock:  # else events would be sent twice
            begun = time.monotonic()
            events = list(self._events)
            async with self._database.writing() as session:
                wanted = await claimed.heartbeat(session, job, worker, self._seconds, self.progress)
                for message, level, metrics in events:
                    await claimed.add_event(session, job, worker, message, level, metrics)
            self._renewed = begun
            del self._events[: len(events)]
        return wanted

    async def write(self, action: Callable[[AsyncSession], Awaitable[T]]) -> T:
        """Do something in a writing transaction, as often as it takes while the lease lasts."""

        async def once() -> T:
            async with self._database.writing() as session:
                return await action(session)

        return await retry_until(once, self.until)

    async def _poll(self) -> Wanted:
        async with self._database.reading() as session:
            return await claimed.poll(session, self._claim.id, self._claim.worker)
