"""The queue of fine-tuning jobs: which job a worker claims next, which gives way, and which lost
its worker.

`claimed` has what a worker may do to a job that it has claimed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, case, func, or_, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from reft_serve.database.jobs.outcomes import (
    MOST_ATTEMPTS,
    end,
    fail_after_attempts,
    pause,
    record_event,
    requeue,
)
from reft_serve.database.models import Job, Tenant, new_id, now_ms

__all__ = [
    "Claim",
    "claim",
    "make_way",
    "sweep",
]

# Since when a job in the queue waits.
_SINCE = func.coalesce(Job.lease_until_ms, Job.created_ms)


@dataclass(frozen=True, slots=True)
class Claim:
    """A job as the worker that holds it sees it.

    Args:
        worker: the lease; give it to every function of `claimed`. It differs from claim to claim,
            also of one worker.
        resolved: what an attempt before found "auto" to be; empty at first.
        step: as far as any attempt has come.
        adapter: the name that the version will have.
        started_ms: when the first attempt began.
        parent_model, parent_digest: the version to continue from; None for a new adapter.
        limits: the tenant's own.
    """

    id: str
    worker: str
    tenant_id: str
    tenant: str
    model: str
    method: Mapping[str, Any]
    hyperparameters: Mapping[str, Any]
    resolved: Mapping[str, Any]
    training_file_id: str
    validation_file_id: str | None
    seed: int
    metadata: Mapping[str, str]
    integrations: Sequence[Mapping[str, Any]]
    adapter: str
    attempts: int
    step: int
    created_ms: int
    started_ms: int
    limits: Mapping[str, Any]
    parent_model: str | None = None
    parent_digest: str | None = None


async def claim(
    session: AsyncSession,
    worker: str,
    lease_seconds: float,
    memory_bytes: int | None = None,
    running_per_tenant: int | None = None,
    most_attempts: int = MOST_ATTEMPTS,
) -> Claim | None:
    """Take the job whose turn it is: of the highest priority, of the tenant with the fewest
    running, of the tenant whose jobs gave way longest ago or not at all, the oldest.

    Args:
        session: a writing one.
        worker: its name, for people.
        lease_seconds: how long the job is this worker's without a heartbeat.
        memory_bytes: take none that is known to need more.
        running_per_tenant: the most jobs of a tenant that run at once, if the tenant has no such
            limit.
        most_attempts: attempts that may end without progress.
    """
    if session.get_bind().dialect.name == "postgresql":
        # Rows are claimed by SKIP LOCKED; this only lets each claim count what the one before has
        # taken.
        await session.execute(
            text("SELECT pg_advisory_xact_lock(hashtextextended('jobs.claim', 0))")
        )
    await sweep(session, most_attempts)
    busy = await _busy(session)
    query = _waiting(memory_bytes, await _full(session, busy, running_per_tenant)).order_by(
        Job.priority.desc()
    )
    for turns in (busy, await _gave_way(session)):
        if turns:
            query = query.order_by(case(turns, value=Job.tenant_id, else_=0))
    first = query.order_by(_SINCE, Job.id).limit(1).with_for_update(of=Job, skip_locked=True)
    job: Job | None = await session.scalar(first)
    if job is None:
        return None
    job.status = "running"
    job.attempts = job.attempts + 1
    job.worker = f"{worker[:120]}/{new_id('lease')}"
    job.lease_until_ms = now_ms() + int(lease_seconds * 1000)
    again = job.started_ms is not None
    job.started_ms = job.started_ms or now_ms()
    record_event(
        session, job, "The fine-tuning job continues" if again else "Fine-tuning job started"
    )
    await session.flush()
    return _claimed(job)


async def make_way(
    session: AsyncSession,
    held: Sequence[str],
    memory_bytes: int,
    running_per_tenant: int | None = None,
    waited_seconds: float = 0.0,
) -> str | None:
    """Ask one of a worker's jobs to give way, if the job of a tenant with fewer running ones waits;
    the answer is its id.

    It stores a checkpoint, goes back to the queue behind those that wait, and continues when it is
    its turn. No more jobs are asked than tenants wait, so several workers do not all make way for
    one job.

    Args:
        session: a writing one.
        held: jobs of the worker that have run long enough, the first to give way first.
        memory_bytes: of the worker; jobs that need more wait for another one.
        running_per_tenant: as for `claim`.
        waited_seconds: a job that has waited less does not count: a worker with room may take it.
    """
    if session.get_bind().dialect.name == "postgresql":
        await session.execute(
            text("SELECT pg_advisory_xact_lock(hashtextextended('jobs.claim', 0))")
        )
    busy = await _busy(session)
    fitting = _waiting(memory_bytes, await _full(session, busy, running_per_tenant))
    fitting = fitting.where(now_ms() - int(waited_seconds * 1000) >= _SINCE)
    grouped = fitting.with_only_columns(Job.tenant_id, func.max(Job.priority)).group_by(
        Job.tenant_id
    )
    waiting: dict[str, int] = dict((await session.execute(grouped)).all())
    asked = (
        select(func.count()).select_from(Job).where(Job.status == "running", Job.wanted == "yield")
    )
    if not waiting or (await session.scalar(asked) or 0) >= len(waiting):
        return None
    for job_id in held:
        job = await session.get(Job, job_id, with_for_update={"of": Job}, populate_existing=True)
        if job is None or job.status != "running" or job.wanted != "none":
            continue
        mine = busy.get(job.tenant_id, 0)
        if any(
            tenant != job.tenant_id and priority >= job.priority and busy.get(tenant, 0) < mine
            for tenant, priority in waiting.items()
        ):
            job.wanted = "yield"
            record_event(
                session,
                job,
                "Another tenant's job is waiting: this job stores a checkpoint and returns to the "
                "queue",
            )
            await session.flush()
            return job.id
    return None


async def sweep(session: AsyncSession, most_attempts: int = MOST_ATTEMPTS) -> int:
    """Requeue, end or fail the jobs whose leases have expired, and return their number."""
    lost = (
        select(Job).where(Job.status == "running", Job.lease_until_ms < now_ms()).order_by(Job.id)
    )
    jobs = (await session.scalars(lost.with_for_update(of=Job, skip_locked=True))).all()
    for job in jobs:
        if job.wanted == "cancel":
            await end(session, job, "cancelled")
        elif job.wanted == "pause":
            pause(session, job)
        elif job.attempts >= most_attempts:
            await fail_after_attempts(session, job, "worker lost")
        else:
            requeue(job)
            record_event(
                session,
                job,
                "The worker was lost; the job will continue from its last checkpoint",
                "warn",
            )
    await session.flush()
    return len(jobs)


async def _busy(session: AsyncSession) -> dict[str, int]:
    """Number of running jobs per tenant, for tenants that have any."""
    query = (
        select(Job.tenant_id, func.count()).where(Job.status == "running").group_by(Job.tenant_id)
    )
    return dict((await session.execute(query)).all())


async def _gave_way(session: AsyncSession) -> dict[str, int]:
    """When the tenants with jobs that gave way and wait again did so last: the others' jobs come
    before theirs.
    """
    query = select(Job.tenant_id, func.max(Job.lease_until_ms)).where(Job.status == "queued")
    rows = await session.execute(
        query.where(Job.lease_until_ms.is_not(None)).group_by(Job.tenant_id)
    )
    return {tenant: since or 0 for tenant, since in rows.all()}


async def _full(session: AsyncSession, busy: Mapping[str, int], default: int | None) -> list[str]:
    """The tenants that may not run one more."""
    rows = await session.execute(select(Tenant.id, Tenant.limits).where(Tenant.id.in_(busy)))
    most = {tenant: limits.get("running_jobs", default) for tenant, limits in rows.all()}
    return [tenant for tenant, limit in most.items() if limit is not None and busy[tenant] >= limit]


def _waiting(memory_bytes: int | None, full: Sequence[str]) -> Select[Job]:
    able = select(Tenant.id).where(Tenant.disabled_ms.is_(None))
    query = select(Job).where(
        Job.status == "queued", Job.tenant_id.in_(able), Job.tenant_id.not_in(full)
    )
    if memory_bytes is not None:
        query = query.where(or_(Job.memory_bytes.is_(None), Job.memory_bytes <= memory_bytes))
    return query


def _claimed(job: Job) -> Claim:
    return Claim(
        id=job.id,
        worker=job.worker or "",
        tenant_id=job.tenant_id,
        tenant=job.tenant.name,
        model=job.model,
        method=job.method,
        hyperparameters=job.hyperparameters,
        resolved=job.resolved,
        training_file_id=job.training_file_id,
        validation_file_id=job.validation_file_id,
        seed=job.seed,
        metadata=job.metadata_,
        integrations=job.integrations,
        adapter=job.adapter,
        attempts=job.attempts,
        step=job.step,
        created_ms=job.created_ms,
        started_ms=job.started_ms or now_ms(),
        limits=job.tenant.limits,
        parent_model=job.parent_model,
        parent_digest=job.parent_digest,
    )
