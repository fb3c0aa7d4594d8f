"""A job's lease, over a database that a test takes away: what is kept, what is said once, and when
it is given up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncSession

from reft_serve.database.jobs import claimed, queue
from reft_serve.database.jobs.claimed import Progress
from reft_serve.database.jobs.queue import Claim
from reft_serve.errors import LeaseLost
from reft_serve.training.jobs.lease import Lease
from tests.support.training.jobs import Place

pytestmark = pytest.mark.anyio
SECONDS = 0.6
BEFORE_THE_END = 3.0  # seconds from `until` to the end of a lease of 20 s


class Flaky:
    """The database of a place; while `away`, no transaction begins, and with `breaks` none is
    committed.
    """

    def __init__(self, place: Place) -> None:
        self._database = place.database
        self.away = self.breaks = False
        self.tries = 0

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncSession]:
        self._try()
        async with self._database.writing() as session:
            yield session
            if self.breaks:
                raise OperationalError("COMMIT", {}, OSError("it broke off"))

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncSession]:
        self._try()
        async with self._database.reading() as session:
            yield session

    def _try(self) -> None:
        self.tries += 1
        if self.away:
            raise OperationalError("BEGIN", {}, OSError("away"))


async def leased(
    place: Place, seconds: float = SECONDS, age: float = 0.0
) -> tuple[Lease, Flaky, Claim]:
    """A job's lease of so many seconds, the first `age` of which have passed."""
    await place.job()
    begun, database = time.monotonic() - age, Flaky(place)
    async with place.database.writing() as session:
        claim = await queue.claim(session, "one", seconds)
    assert claim is not None
    given: Any = database
    return Lease(given, claim, seconds, begun), database, claim


async def test_what_is_told_is_written_once_though_a_heartbeat_breaks_off(place: Place) -> None:
    lease, database, claim = await leased(place)
    lease.queue_event("first")
    database.breaks = True
    with pytest.raises(OperationalError):
        await lease.heartbeat()
    assert "first" not in await place.told(claim.id)
    database.breaks = False
    lease.queue_event("second")
    await asyncio.gather(lease.heartbeat(), lease.heartbeat())
    assert [each for each in await place.told(claim.id) if each in ("first", "second")] == [
        "first",
        "second",
    ]


async def test_a_heartbeat_moves_the_end_and_carries_the_progress(place: Place) -> None:
    lease, database, claim = await leased(place, 10.0)
    before = lease.until()
    assert before == pytest.approx(time.monotonic() + 8.5, abs=2.0)  # earlier than the database's
    lease.progress = Progress(3, 9, 30)
    await asyncio.sleep(0.01)
    await lease.heartbeat()
    assert lease.until() > before
    job = await place.find(claim.id)
    assert (job.step, job.steps) == (3, 9)
    database.breaks, kept = True, lease.until()
    with pytest.raises(OperationalError):
        await lease.heartbeat()
    assert lease.until() == kept


async def test_a_kept_job_is_heard_of_before_its_lease_ends(place: Place) -> None:
    lease, _, claim = await leased(place, 1.5)
    keeping = asyncio.create_task(lease.keep(lambda wanted: None))
    await asyncio.sleep(1.7)
    assert not keeping.done()
    async with place.database.writing() as session:  # another worker finds nothing to take over
        assert await queue.claim(session, "two", SECONDS) is None
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    await lease.heartbeat()
    assert (await place.find(claim.id)).status == "running"


async def test_what_the_owner_wants_is_said_when_it_changes(place: Place) -> None:
    lease, _, claim = await leased(place, 10.0)
    heard: list[str] = []
    keeping = asyncio.create_task(lease.keep(heard.append))
    await place.ask(claim.id, "pause")
    async with asyncio.timeout(5):
        while not heard:
            lease.wake()
            await asyncio.sleep(0.01)
    lease.wake()
    await asyncio.sleep(0.3)
    await place.ask(claim.id, "cancel")
    async with asyncio.timeout(5):
        while len(heard) < 2:
            await asyncio.sleep(0.01)
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    assert heard == ["pause", "cancel"]
    assert lease.wanted == "cancel"


async def test_a_job_is_let_go_of_before_its_lease_ends_if_the_database_is_away(
    place: Place,
) -> None:
    lease, database, _ = await leased(place, 20.0, age=16.0)
    database.away = True
    with pytest.raises(LeaseLost, match="for too long"):
        await lease.keep(lambda wanted: None)
    assert 0 < time.monotonic() - lease.until() < BEFORE_THE_END, "another worker may have it then"
    assert database.tries > 1


async def test_a_database_that_comes_back_in_time_costs_nothing(place: Place) -> None:
    lease, database, _ = await leased(place, 20.0)
    lease.queue_event("news are not kept back for long")
    database.away = True
    keeping = asyncio.create_task(lease.keep(lambda wanted: None))
    await asyncio.sleep(0.5)
    database.away, before = False, lease.until()
    async with asyncio.timeout(5):
        while lease.until() == before:
            await asyncio.wait({keeping}, timeout=0.02)
            assert not keeping.done()
    assert not keeping.done()
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)


async def test_a_job_of_another_worker_is_lost_at_once(place: Place) -> None:
    lease, _, claim = await leased(place)
    async with place.database.writing() as session:
        await claimed.release(session, claim.id, claim.worker)
    with pytest.raises(LeaseLost):
        await lease.heartbeat()
    with pytest.raises(LeaseLost):
        await lease.keep(lambda wanted: None)


async def test_a_write_is_tried_until_the_database_is_there_but_not_past_the_lease(
    place: Place,
) -> None:
    lease, database, claim = await leased(place, 20.0, age=16.0)
    database.away = True
    asyncio.get_running_loop().call_later(0.1, setattr, database, "away", False)
    await lease.write(lambda session: claimed.add_event(session, claim.id, claim.worker, "written"))
    assert "written" in await place.told(claim.id)
    database.away = True
    with pytest.raises(OperationalError):
        await lease.write(
            lambda session: claimed.add_event(session, claim.id, claim.worker, "late")
        )
    assert time.monotonic() - lease.until() < BEFORE_THE_END


async def test_a_write_that_can_never_work_is_tried_once(place: Place) -> None:
    lease, database, _ = await leased(place)

    async def wrong(session: AsyncSession) -> None:
        raise IntegrityError("INSERT", {}, ValueError("twice"))

    tries = database.tries
    with pytest.raises(IntegrityError):
        await lease.write(wrong)
    assert database.tries == tries + 1


async def test_to_look_is_asked_for_at_most_every_few_hundredths_of_a_second(place: Place) -> None:
    lease, _, _ = await leased(place)
    lease.wake()
    assert lease._woken.is_set()
    lease._woken.clear()
    lease.wake()
    assert not lease._woken.is_set()
    await asyncio.sleep(0.04)
    lease.wake()
    assert lease._woken.is_set()
