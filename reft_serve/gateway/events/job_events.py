"""A job's events as they happen: server-sent events that the `openai` client's streams read.

Events lie in the database, so a stream can be taken up at any gateway, after any event, whose id is
in each of them. One look at the database, twice a second, serves all streams of a process, and ends
those whose key has ended.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from reft_serve.config import TenantLimits
from reft_serve.database.connection import Database
from reft_serve.database.jobs import fine_tuning
from reft_serve.database.jobs.fine_tuning import JobState
from reft_serve.database.jobs.outcomes import FINAL
from reft_serve.database.keys import Principal, living_keys
from reft_serve.database.models import Event
from reft_serve.errors import KeyInvalid, RateLimited
from reft_serve.gateway.http.streaming import ClientGone, Streamed
from reft_serve.gateway.schemas.errors import error_body
from reft_serve.gateway.schemas.fine_tuning import EventOut

__all__ = ["LONGEST_SECONDS", "STREAMS", "Followers"]

_log = logging.getLogger(__name__)
STREAMS = 1000
LONGEST_SECONDS = 3600.0
_POLL_SECONDS = 0.5
_QUIET_SECONDS = 15.0
_BATCH = 500
_Emit = Callable[[bytes], Awaitable[None]]


@dataclass(eq=False, slots=True)
class _Follower:
    """One stream: its job, its caller, and the job's state at the last poll of the database."""

    job_id: str
    tenant_id: str
    key_id: str
    state: JobState | None = None
    has_key: bool = True
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    deadline: asyncio.Timeout | None = None
    sending: bool = False

    def end(self) -> None:
        """End the stream now, even while it waits for its client."""
        self.changed.set()
        if self.sending and self.deadline is not None:
            self.deadline.reschedule(0.0)


class Followers:
    """The streams of events that this process has open."""

    def __init__(self, database: Database, limits: TenantLimits) -> None:
        self._database = database
        self._limits = limits
        self._open: set[_Follower] = set()
        self._counts: Counter[str] = Counter()
        self._looking: asyncio.Task[None] | None = None
        self._closing = False

    def __len__(self) -> int:
        return len(self._open)

    async def follow(self, caller: Principal, job_id: str, after: str | None) -> Streamed:
        """The events of a job from the beginning, or from that after `after`, on, until the job has
        ended.

        Raises:
            NotFound: the job has no event `after`.
            RateLimited: the tenant, its key or this process has as many streams as it may.
        """
        number = 0
        if after is not None:
            async with self._database.reading() as session:
                number = await fine_tuning.number_of_event(session, job_id, after)
        self._check(caller)
        follower = _Follower(job_id, caller.tenant_id, caller.key_id)
        self._open.add(follower)
        holders = [caller.tenant_id, *(name for name, _ in caller.counters)]
        self._counts.update(holders)
        if self._looking is None or self._looking.done():
            # For all tenants: it takes none of this caller's sessions.
            self._looking = asyncio.create_task(self._look_forever(), context=contextvars.Context())

        async def relay(emit: _Emit) -> None:
            await self._relay(follower, number, emit)

        async def finish() -> None:
            self._open.discard(follower)
            self._counts.subtract(holders)
            self._counts += Counter()

        return Streamed(relay, {}, finish)

    def close(self) -> None:
        """End every stream soon, for the shutdown of this process."""
        self._closing = True

    def _check(self, caller: Principal) -> None:
        if len(self._open) >= STREAMS:
            raise RateLimited("too many event streams are open; list the events instead", 10.0)
        holders = [(caller.tenant_id, self._limits.merged(caller.limits))]
        holders += [(name, TenantLimits().merged(own)) for name, own in caller.counters]
        for name, limits in holders:
            if limits.event_streams is not None and self._counts[name] >= limits.event_streams:
                raise RateLimited(
                    f"the limit of {limits.event_streams} event streams is reached; list the "
                    "events instead",
                    10.0,
                )

    async def _relay(self, follower: _Follower, number: int, emit: _Emit) -> None:
        async def send(events: bytes) -> None:
            follower.sending = True
            await emit(events)
            follower.sending = False

        try:
            async with asyncio.timeout(LONGEST_SECONDS) as follower.deadline:
                await self._send_events(follower, number, send)
        except TimeoutError:
            if follower.sending:  # the reader does not read: it would not read an end either
                raise ClientGone from None

    async def _send_events(self, follower: _Follower, number: int, send: _Emit) -> None:
        await self._poll([follower])
        while not self._closing:
            follower.changed.clear()
            state = follower.state
            if not follower.has_key:
                gone = KeyInvalid("this API key is expired or revoked")
                await send(
                    f"data: {json.dumps(error_body(401, str(gone), None, gone.code))}\n\n".encode()
                )
                return
            if state is None or (state.status in FINAL and state.latest <= number):
                await send(b"data: [DONE]\n\n")
                return
            events = await self._events(follower.job_id, number) if state.latest > number else ()
            for event in events:
                await send(_sent(event))
                number = event.number
            if events:
                continue
            try:
                async with asyncio.timeout(_QUIET_SECONDS):
                    await follower.changed.wait()
            except TimeoutError:  # so that nothing on the way takes the connection for dead
                await send(b": still here\n\n")

    async def _events(self, job_id: str, number: int) -> Sequence[Event]:
        async with self._database.reading() as session:
            return await fine_tuning.events_since(session, job_id, number)

    async def _look_forever(self) -> None:
        while self._open:
            await asyncio.sleep(_POLL_SECONDS)
            if self._closing:
                for follower in self._open:
                    follower.end()
                continue
            try:
                followers = list(self._open)
                for start in range(0, len(followers), _BATCH):
                    await self._poll(followers[start : start + _BATCH])
            except Exception:
                _log.exception("job events cannot be read; retrying")

    async def _poll(self, followers: Sequence[_Follower]) -> None:
        """Find how jobs and keys stand, in two queries for all of these followers."""
        async with self._database.reading() as session:
            states = await fine_tuning.states_of(session, {each.job_id for each in followers})
            alive = await living_keys(session, {each.key_id for each in followers})
        for follower in followers:
            state = states.get(follower.job_id)
            has_key = follower.key_id in alive
            if has_key != follower.has_key:
                follower.has_key = has_key
                follower.end()
            elif state != follower.state:
                follower.changed.set()
            follower.state = state


def _sent(event: Event) -> bytes:
    return f"id: {event.id}\ndata: {EventOut.of(event).model_dump_json()}\n\n".encode()
