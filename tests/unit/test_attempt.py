"""One claimed job and a process that says what a test gives it to say: how each end is recorded,
without training.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from reft_serve.database.jobs import claimed, queue
from reft_serve.database.models import Job
from reft_serve.errors import StoreUnusable
from reft_serve.training.jobs.attempt import Allocation, Attempt, _why
from reft_serve.training.jobs.context import WorkerContext
from reft_serve.training.jobs.messages import (
    Broken,
    Ended,
    JobSpec,
    Measured,
    Message,
    Noted,
    Resolved,
    Started,
)
from tests.support.training.jobs import MODEL, Place

pytestmark = pytest.mark.anyio
GIB = 1 << 30
HUGE = Allocation("cpu", 1000 * GIB, 1000 * GIB, 1)
BEGIN = (Resolved(resolved={"batch_size": 4}), Started(step=0, steps=4))


@dataclass
class Process:
    """Says its messages, then ends with its code. `ask` is called before each message."""

    says: tuple[Message, ...] = ()
    code: int | None = 0
    waits: bool = False
    calls: list[str] = field(default_factory=list)
    specs: list[JobSpec] = field(default_factory=list)
    _ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self, spec: JobSpec) -> Process:
        self.specs.append(spec)
        return self

    async def messages(self) -> AsyncIterator[Message]:
        for message in self.says:
            yield message
        if self.waits:
            await self._ended.wait()
            if self.calls[-1] == "stop":
                yield Ended(done=False, step=2, tokens=20)

    def stop(self) -> None:
        self.calls.append("stop")
        self._ended.set()

    def kill(self) -> None:
        self.calls.append("kill")
        self._ended.set()

    async def wait(self) -> int | None:
        return -signal.SIGKILL if "kill" in self.calls and self.waits else self.code


async def attempt_of(
    place: Place, process: Process, device: Allocation = HUGE, **changed: Any
) -> Attempt:
    job_id = await place.job()
    begun = time.monotonic()
    async with place.database.writing() as session:
        claim = await queue.claim(session, "one", 10.0)
    assert claim is not None
    assert claim.id == job_id
    work = place.folder / "work"
    work.mkdir()
    processes: Any = process
    settings = place.settings(**changed)
    ctx = WorkerContext(settings, place.database, place.store, place.blobs, processes, MODEL, work)
    return Attempt(ctx, claim, device, begun)


async def ended(
    place: Place, *says: Message, code: int | None = 0, **changed: Any
) -> tuple[str, Attempt, Job]:
    attempt = await attempt_of(place, Process((*BEGIN, *says), code), **changed)
    result = await attempt.run()
    assert list((place.folder / "work").iterdir()) == []
    return result, attempt, await place.find(attempt.claim.id)


def broken(cause: Any) -> Broken:
    return Broken.model_validate(
        {
            _CAUSE: cause,
            "code": "training_diverged",
            "message": "it is so",
            "param": "rank",
            "traceback": "at line 1",
        }
    )


# Whose fault it is; the field's name is the protocol's own matter.
(_CAUSE,) = {"whose", "cause"} & Broken.model_fields.keys()


async def test_the_users_fault_ends_the_job_with_its_sentence(place: Place) -> None:
    result, attempt, job = await ended(place, broken("user"))
    assert (result, job.status) == ("failed", "failed")
    assert job.error is not None
    assert {
        "code": "training_diverged",
        "message": "it is so",
        "param": "rank",
    }.items() <= job.error.items()
    assert not attempt.troubled


async def test_the_machines_fault_gives_the_job_back_and_does_not_count(place: Place) -> None:
    result, attempt, job = await ended(place, broken("machine"))
    assert (result, job.status, job.attempts) == ("queued", "queued", 0)
    assert attempt.troubled
    assert any("it is so" in told for told in await place.told(job.id))


async def test_a_fault_that_nobody_knows_counts_as_an_attempt(place: Place) -> None:
    result, attempt, job = await ended(place, broken("unknown"))
    assert (result, job.attempts, job.traceback) == ("queued", 1, "at line 1")
    assert job.memory_bytes == attempt.memory


async def test_after_the_last_attempt_it_has_failed(place: Place) -> None:
    result, _, job = await ended(place, broken("unknown"), train_attempts=1)
    assert (result, job.status) == ("failed", "failed")


@pytest.mark.parametrize("says", [(broken("memory"),), ()], ids=["it said so", "it was killed"])
async def test_a_lack_of_memory_raises_the_estimate(
    place: Place, says: tuple[Message, ...]
) -> None:
    result, attempt, job = await ended(place, *says, code=-signal.SIGKILL)
    assert (result, job.attempts) == ("queued", 1)
    assert job.memory_bytes == int(1.5 * attempt.memory)


async def test_no_estimate_is_more_than_the_machine_has(place: Place) -> None:
    probe = await attempt_of(place, Process(BEGIN))
    await probe._fits()
    probe.place = Allocation("cpu", probe.memory, probe.memory + 1, 1)
    assert probe._more_memory() == probe.memory + 1


async def test_another_code_is_told_and_is_no_lack_of_memory(place: Place) -> None:
    result, attempt, job = await ended(place, code=3)
    assert (result, job.attempts, job.memory_bytes) == ("queued", 1, attempt.memory)
    assert job.traceback is not None
    assert "code 3" in job.traceback


async def test_what_the_process_says_reaches_the_job(place: Place) -> None:
    metrics = {"loss": 1.5, "tokens": 40.0}
    says = (
        Noted(message="look here"),
        Measured(step=1, metrics=metrics),
        Measured(step=2, metrics=metrics | {"tokens": 80.0}),
    )
    _, _, job = await ended(place, *says, broken("unknown"))
    assert (job.step, job.steps) == (2, 4)
    assert job.resolved == {"batch_size": 4}
    told = await place.told(job.id)
    assert "look here" in told
    assert "Step 1/4: training loss=1.5000" in told


async def test_a_job_without_room_waits_for_another_worker(place: Place) -> None:
    process = Process(BEGIN)
    attempt = await attempt_of(place, process, Allocation("cpu", 1, 2, 1))
    assert await attempt.run() == "queued"
    job = await place.find(attempt.claim.id)
    assert (job.attempts, job.memory_bytes) == (0, attempt.memory)
    assert process.specs == []
    assert any("waits for a larger one" in told for told in await place.told(job.id))


async def test_a_worker_that_drains_stops_the_run_and_gives_the_job_back(place: Place) -> None:
    process = Process(BEGIN, waits=True)
    attempt = await attempt_of(place, process)
    running = asyncio.create_task(attempt.run())
    await until(process)
    attempt.drain()
    assert await running == "queued"
    assert process.calls[0] == "stop"
    assert (await place.find(attempt.claim.id)).attempts == 0


async def test_a_worker_that_gives_up_kills_the_run_and_the_attempt_does_not_count(
    place: Place,
) -> None:
    process = Process(BEGIN, waits=True)
    attempt = await attempt_of(place, process)
    running = asyncio.create_task(attempt.run())
    await until(process)
    attempt.give_up()
    assert await running == "queued"
    assert process.calls[0] == "kill"
    assert (await place.find(attempt.claim.id)).attempts == 0


@pytest.mark.parametrize(
    ("asked", "call", "status"), [("cancel", "kill", "cancelled"), ("pause", "stop", "paused")]
)
async def test_what_the_owner_wants_is_done(
    place: Place, asked: str, call: str, status: str
) -> None:
    process = Process(BEGIN, waits=True)
    attempt = await attempt_of(place, process)
    running = asyncio.create_task(attempt.run())
    await until(process)
    await place.ask(attempt.claim.id, asked)
    async with asyncio.timeout(10):
        assert await running == status
    assert process.calls[0] == call
    assert (await place.find(attempt.claim.id)).status == status


async def test_a_job_that_is_cancelled_before_its_process_starts_has_none(place: Place) -> None:
    process = Process(BEGIN)
    attempt = await attempt_of(place, process)
    await place.ask(attempt.claim.id, "cancel")
    attempt._lease.wanted = "cancel"
    assert await attempt.run() == "cancelled"
    assert process.specs == []


async def test_a_job_that_another_worker_has_is_let_go_of(place: Place) -> None:
    process = Process(BEGIN, waits=True)
    attempt = await attempt_of(place, process)
    running = asyncio.create_task(attempt.run())
    await until(process)
    async with place.database.writing() as session:
        await claimed.release(session, attempt.claim.id, attempt.claim.worker)
    async with asyncio.timeout(10):
        assert await running == "lost"
    assert process.calls[0] == "kill"
    assert not attempt.troubled


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
async def test_a_file_that_is_gone_ends_the_job_and_names_the_field(
    place: Place, param: str
) -> None:
    process = Process(BEGIN)
    job_id = await place.job(held_out=b'{"prompt": "a", "completion": "b"}\n')
    file_id = getattr(await place.find(job_id), f"{param}_id")
    (blob,) = [blob for blob in await place.blobs.list("files") if blob.key.endswith(file_id)]
    await place.blobs.delete(blob.key)
    async with place.database.writing() as session:
        claim = await queue.claim(session, "one", 10.0)
    assert claim is not None
    (place.folder / "work").mkdir()
    processes: Any = process
    ctx = WorkerContext(
        place.settings(),
        place.database,
        place.store,
        place.blobs,
        processes,
        MODEL,
        place.folder / "work",
    )
    assert await Attempt(ctx, claim, HUGE, time.monotonic()).run() == "failed"
    error = (await place.find(job_id)).error
    assert error is not None
    assert (error["code"], error["param"]) == ("file_missing", param)


@pytest.mark.parametrize(
    ("exc", "told"),
    [
        (StoreUnusable("the store is full"), "the store is full"),
        (
            OSError(28, "No space left on device", "/secret/path"),
            "the worker's disk cannot be used (No space left on device)",
        ),
        (OSError("Connection refused to db.internal"), "the database did not respond"),
        (OperationalError("SELECT secret", {}, OSError()), "the database did not respond"),
    ],
)
def test_trouble_is_told_without_statements_and_paths(exc: Exception, told: str) -> None:
    assert _why(exc) == told


async def until(process: Process) -> None:
    async with asyncio.timeout(10):
        while not process.specs:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
