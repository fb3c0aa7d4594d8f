"""Changes to a job by the worker that holds its lease: kept by heartbeat, ended once.

Every change checks the lease in its own transaction, so a slow worker, or one presumed dead,
changes nothing: it gets LeaseLost. An event is written in the transaction of the change that it
reports.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from reft_serve.config import TenantLimits
from reft_serve.database.jobs.outcomes import (
    MOST_ATTEMPTS,
    Failed,
    Level,
    Outcome,
    Paused,
    Status,
    Succeeded,
    Wanted,
    end,
    fail_after_attempts,
    fit,
    pause,
    publish,
    put_checkpoint,
    record_event,
    requeue,
)
from reft_serve.database.models import Job, now_ms
from reft_serve.database.room import check_room
from reft_serve.errors import LeaseLost, RateLimited

__all__ = [
    "Progress",
    "add_checkpoint",
    "add_event",
    "finish",
    "heartbeat",
    "poll",
    "release",
    "resolve",
]

_NO_LIMITS = TenantLimits()


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a job. `estimated_finish_ms`: milliseconds since 1970."""

    step: int
    steps: int
    trained_tokens: int
    estimated_finish_ms: int | None = None


async def heartbeat(
    session: AsyncSession,
    job_id: str,
    worker: str,
    lease_seconds: float,
    progress: Progress | None = None,
) -> Wanted:
    """Renew the lease, report progress, and return the action that the owner wants.

    Raises:
        LeaseLost: it is no longer this worker's.
    """
    job = await _held(session, job_id, worker)
    job.lease_until_ms = now_ms() + int(lease_seconds * 1000)
    if progress is not None:
        # farther than ever: what failed before was not the job's own doing
        if progress.step > job.step:
            job.step = progress.step
            job.attempts = 1
        job.steps = progress.steps
        job.trained_tokens = progress.trained_tokens
        job.estimated_finish_ms = progress.estimated_finish_ms
    await session.flush()
    wanted: Wanted = job.wanted  # type: ignore[assignment]
    return wanted


async def poll(session: AsyncSession, job_id: str, worker: str) -> Wanted:
    """The action that a job's owner wants; does not renew the lease.

    Raises:
        LeaseLost: it is no longer this worker's.
    """
    query = select(Job.wanted).where(
        Job.id == job_id, Job.status == "running", Job.worker == worker
    )
    wanted: Wanted | None = await session.scalar(query)
    if wanted is None:
        raise _lost(job_id, worker)
    return wanted


async def resolve(
    session: AsyncSession,
    job_id: str,
    worker: str,
    resolved: Mapping[str, Any],
    steps: int | None = None,
    memory_bytes: int | None = None,
) -> None:
    """Record the resolved "auto" values, the number of steps, and the job's memory.

    Raises:
        LeaseLost: it is no longer this worker's.
    """
    job = await _held(session, job_id, worker)
    job.resolved = dict(resolved)
    job.steps = steps if steps is not None else job.steps
    job.memory_bytes = memory_bytes if memory_bytes is not None else job.memory_bytes
    await session.flush()


async def add_event(
    session: AsyncSession,
    job_id: str,
    worker: str,
    message: str,
    level: Level = "info",
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Add an event for the job's owner; with `metrics`, OpenAI's metrics event.

    Raises:
        LeaseLost: it is no longer this worker's.
    """
    record_event(session, await _held(session, job_id, worker), message, level, metrics)
    await session.flush()


async def add_checkpoint(
    session: AsyncSession,
    job_id: str,
    worker: str,
    step: int,
    metrics: Mapping[str, float],
    limits: TenantLimits = _NO_LIMITS,
) -> None:
    """Record a checkpoint that a job can resume from. It gets its own name, and is listed, when the
    job succeeds. The event warns if the tenant's limits leave no room for the job's result.

    Raises:
        LeaseLost: it is no longer this worker's.
    """
    job = await _held(session, job_id, worker)
    await put_checkpoint(session, job, step, metrics, None)
    record_event(session, job, f"Checkpoint saved at step {step}")
    try:
        own = limits.merged(job.tenant.limits)
        await check_room(session, job.tenant_id, own, size=1, adapter=job.adapter, versions=1)
    except RateLimited as exc:
        record_event(
            session, job, f"The result could not be published if the job ended now: {exc}", "warn"
        )
    await session.flush()


async def finish(
    session: AsyncSession,
    job_id: str,
    worker: str,
    outcome: Outcome,
    limits: TenantLimits = _NO_LIMITS,
) -> Status:
    """End the job's run, with everything that belongs to it, at once; the answer is how it ended. A
    result that the tenant's limits (default: `limits`) leave no room for is a failure; checkpoints
    beyond them are left out.

    A cancel that was asked for before wins over success: then nothing is published, and the answer
    is "cancelled". The caller of a success holds `Database.lock` of each digest and has seen that
    its files are there.

    Raises:
        LeaseLost: it is no longer this worker's.
    """
    job = await _held(session, job_id, worker)
    if isinstance(outcome, Succeeded) and job.wanted != "cancel":
        outcome = await fit(session, job, outcome, limits)
    if isinstance(outcome, Failed):
        job.error = {"code": outcome.code, "message": outcome.message, "param": outcome.param}
        job.traceback = outcome.traceback
        await end(session, job, "failed")
    elif isinstance(outcome, Paused) and job.wanted != "cancel":
        pause(session, job)
    elif isinstance(outcome, Succeeded) and job.wanted != "cancel":
        await publish(session, job, outcome)
        await end(session, job, "succeeded")
    else:
        await end(session, job, "cancelled")
    await session.flush()
    status: Status = job.status  # type: ignore[assignment]
    return status


async def release(
    session: AsyncSession,
    job_id: str,
    worker: str,
    traceback: str | None = None,
    memory_bytes: int | None = None,
    most_attempts: int = MOST_ATTEMPTS,
) -> Status:
    """Give the job back to the queue, and learn how it stands.

    Args:
        session: a writing one.
        job_id: the job's.
        worker: the lease.
        traceback: why the attempt failed; None if it did not fail, so that it does not count.
        memory_bytes: what the job takes, as was found.
        most_attempts: with so many failed ones the job has failed.

    Raises:
        LeaseLost: it is no longer this worker's.
    """
    job = await _held(session, job_id, worker)
    job.memory_bytes = memory_bytes if memory_bytes is not None else job.memory_bytes
    job.traceback = traceback or job.traceback
    if job.wanted == "cancel":
        await end(session, job, "cancelled")
    elif job.wanted == "pause":
        pause(session, job)
    elif traceback is not None and job.attempts >= most_attempts:
        await fail_after_attempts(session, job, "attempt failed")
    else:
        if traceback is None:
            job.attempts -= 1
        else:
            record_event(
                session,
                job,
                f"Attempt {job.attempts} of {most_attempts} failed; the job will be retried",
                "warn",
            )
        requeue(job)
    await session.flush()
    status: Status = job.status  # type: ignore[assignment]
    return status


async def _held(session: AsyncSession, job_id: str, worker: str) -> Job:
    """The job, locked, if this lease is its."""
    query = select(Job).where(Job.id == job_id, Job.status == "running", Job.worker == worker)
    job = await session.scalar(
        query.with_for_update(of=Job).execution_options(populate_existing=True)
    )
    if job is None:
        raise _lost(job_id, worker)
    return job


def _lost(job_id: str, worker: str) -> LeaseLost:
    return LeaseLost(f"job {job_id[:40]} is no longer held by {worker[:160]}")
