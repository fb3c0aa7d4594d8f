"""A job's events as they happen: server-sent events that the `openai` client's streams read.

Events lie in the database, so a stream can be taken up at any gateway, after any event, whose id is in each of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from sqlalchemy import select

from reft_serve.database import fine_tuning
from reft_serve.database.models import Event, Job
from reft_serve.database.outcomes import FINAL
from reft_serve.errors import NotFound, RateLimited
from reft_serve.gateway.job_schemas import EventOut
from reft_serve.gateway.services import Services
from reft_serve.gateway.streaming import Streamed

__all__ = ["followed"]

_POLL_SECONDS, _QUIET_SECONDS, _LONGEST_SECONDS = 0.5, 15.0, 3600.0
_MOST_STREAMS = 1000
_Emit = Callable[[bytes], Awaitable[None]]


async def followed(services: Services, job_id: str, after: str | None) -> Streamed:
    """The events of a job from the beginning, or from that after `after`, on, until the job has ended.

    Raises:
        NotFound: the job has no event `after`.
        RateLimited: this gateway has as many such streams as it can.
    """
    start = 0
    if after is not None:
        async with services.database.reading() as session:
            query = select(Event.number).where(Event.job_id == job_id, Event.id == after)
            found = await session.scalar(query)
        if found is None:
            raise NotFound(f"job {job_id} has no event {after[:80]!r}")
        start = found
    if services.followers >= _MOST_STREAMS:
        raise RateLimited("too many streams of events are open; list the events instead", 10.0)
    services.followers += 1

    async def relay(emit: _Emit) -> None:
        await _relay(services, job_id, start, emit)

    async def finish() -> None:
        services.followers -= 1

    return Streamed(relay, {}, finish)


async def _relay(services: Services, job_id: str, number: int, emit: _Emit) -> None:
    ends, told = time.monotonic() + _LONGEST_SECONDS, time.monotonic()
    while time.monotonic() < ends and not services.draining:
        status, found = await _look(services, job_id, number)
        for event in found:
            number, told = event.number, time.monotonic()
            await emit(_sent(event))
        if status is None or (status in FINAL and not found):
            await emit(b"data: [DONE]\n\n")
            return
        if time.monotonic() - told > _QUIET_SECONDS:  # so that nothing on the way takes the connection for dead
            told = time.monotonic()
            await emit(b": still here\n\n")
        if not found:
            await asyncio.sleep(_POLL_SECONDS)


async def _look(services: Services, job_id: str, number: int) -> tuple[str | None, Sequence[Event]]:
    """The job's status, and the events that there were by then."""
    async with services.database.reading() as session:
        status = await session.scalar(select(Job.status).where(Job.id == job_id))
        return status, await fine_tuning.events_since(session, job_id, number)


def _sent(event: Event) -> bytes:
    return f"id: {event.id}\ndata: {EventOut.of(event).model_dump_json()}\n\n".encode()
