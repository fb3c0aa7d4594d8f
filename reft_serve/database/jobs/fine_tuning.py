"""Fine-tuning jobs as their owners see them: asked for, looked at, stopped. What workers do is in
`jobs`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sqlalchemy import Select, exists, func, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from reft_serve.database.files import find_file
from reft_serve.database.jobs.outcomes import FINAL, end, record_event
from reft_serve.database.models import Checkpoint, Event, Job, Tenant, new_id
from reft_serve.database.names import check_adapter_name
from reft_serve.errors import Conflict, NotFound, RequestInvalid

__all__ = [
    "JobState",
    "NewJob",
    "count_jobs",
    "create_job",
    "events_since",
    "find_job",
    "list_checkpoints",
    "list_events",
    "list_jobs",
    "number_of_event",
    "request_change",
    "states_of",
    "unfinished_jobs_of",
    "unfinished_of",
]

_MODEL_ID = 255
_LABEL = len(":00000000:ckpt-step-0000000")


@dataclass(frozen=True, slots=True)
class NewJob:
    """A requested job. `model`: the base model's public name; `method` and `hyperparameters` keep
    their "auto"; `parent_model` and `parent_digest`: the version to continue from.
    """

    model: str
    training_file_id: str
    validation_file_id: str | None
    method: dict[str, Any]
    hyperparameters: dict[str, Any]
    seed: int
    suffix: str | None = None
    metadata_: dict[str, str] = field(default_factory=dict)
    integrations: list[dict[str, Any]] = field(default_factory=list)
    priority: int = 0
    parent_model: str | None = None
    parent_digest: str | None = None


@dataclass(frozen=True, slots=True)
class JobState:
    """A job's status, and the number of its latest event."""

    status: str
    latest: int


async def create_job(
    session: AsyncSession, tenant: Tenant, key_id: str | None, wanted: NewJob
) -> Job:
    """Put a job into the queue. Its files are kept for it until it has ended.

    Raises:
        NotFound: a file is not there.
        RequestInvalid: the suffix is not an adapter's name, is reserved, or is too long for the
            names here.
    """
    for file_id in (wanted.training_file_id, wanted.validation_file_id):
        if file_id is not None:
            await find_file(session, tenant.id, file_id, keep=True)
    job_id = new_id("ftjob", "-")
    adapter = wanted.suffix or f"job-{job_id[-8:]}"
    check_adapter_name(adapter, wanted.model, tenant.name, "suffix")
    longest = _MODEL_ID - len(f"ft:{wanted.model}:{tenant.name}:") - _LABEL
    if len(adapter) > longest:
        raise RequestInvalid(
            f"the suffix makes the model's name too long: use at most {longest} characters",
            "suffix",
        )
    job = Job(id=job_id, tenant=tenant, key_id=key_id, adapter=adapter, **asdict(wanted))
    session.add(job)
    await session.flush()
    record_event(session, job, f"Created fine-tuning job: {job.id}")
    record_event(session, job, "The files were validated on upload; the job is queued")
    if job.parent_model is not None:
        record_event(
            session,
            job,
            f"The job continues from {job.parent_model}: its structure and its weights",
        )
    await session.flush()
    return job


async def find_job(
    session: AsyncSession, tenant_id: str | None, job_id: str, *, locked: bool = False
) -> Job:
    """A job of a tenant, or (None) of any.

    Raises:
        NotFound: there is none of this id.
    """
    query = _jobs(tenant_id).where(Job.id == job_id)
    job = await session.scalar(query.with_for_update(of=Job) if locked else query)
    if job is None:
        raise NotFound(f"there is no fine-tuning job {job_id[:80]!r}")
    return job


async def list_jobs(
    session: AsyncSession,
    tenant_id: str | None,
    *,
    after: str | None = None,
    limit: int = 20,
    metadata: Mapping[str, str] | None = None,
    statuses: Sequence[str] | None = None,
) -> tuple[Sequence[Job], bool]:
    """A page of the jobs of a tenant or (None) of all, the newest first, and whether there are
    more.

    Args:
        session: any.
        tenant_id: whose.
        after: the id that the page before ended with.
        limit: the page's length.
        metadata: only jobs with these; an empty mapping means jobs that have none.
        statuses: only these.

    Raises:
        NotFound: there is no job `after`.
    """
    query = _jobs(tenant_id)
    if statuses is not None:
        query = query.where(Job.status.in_(statuses))
    if metadata is not None:
        query = _with_metadata(session, query, metadata)
    if after is not None:
        last = await find_job(session, tenant_id, after)
        query = query.where(tuple_(Job.created_ms, Job.id) < tuple_(last.created_ms, last.id))
    query = query.order_by(Job.created_ms.desc(), Job.id.desc()).limit(limit + 1)
    rows = (await session.scalars(query)).all()
    return rows[:limit], len(rows) > limit


async def request_change(
    session: AsyncSession,
    tenant_id: str | None,
    job_id: str,
    what: Literal["cancel", "pause", "resume"],
) -> Job:
    """Stop a job, of a tenant or (None) of any, or let it continue. What does not run stops at
    once; what runs is stopped by its worker, within a step.

    Raises:
        NotFound: there is no such job.
        Conflict: the job's state does not allow it.
    """
    job = await find_job(session, tenant_id, job_id, locked=True)
    if job.status in FINAL:
        raise Conflict(f"job {job.id} has {job.status} already, so it cannot be {_PAST[what]}")
    if what == "resume":
        _resume(session, job)
    elif job.status == "running":
        if job.wanted != what:
            if job.wanted == "cancel":
                raise Conflict(f"job {job.id} is being cancelled, so it cannot be paused")
            job.wanted = what
            record_event(session, job, f"The job will be {_PAST[what]} after the current step")
    elif what == "cancel":
        await end(session, job, "cancelled")
    elif job.status == "queued":
        job.status = "paused"
        record_event(
            session, job, "The job was paused before it started; resume it to queue it again"
        )
    await session.flush()
    return job


_PAST = {"cancel": "cancelled", "pause": "paused", "resume": "resumed"}


def _resume(session: AsyncSession, job: Job) -> None:
    if job.status == "running" and job.wanted == "pause":
        job.wanted = "none"
        record_event(session, job, "Pause withdrawn; the job keeps running")
    elif job.status == "paused":
        job.status = "queued"
        record_event(session, job, "The job was resumed and is queued")
    else:
        raise Conflict(f"job {job.id} is {job.status}, not paused, so it cannot be resumed")


async def list_events(
    session: AsyncSession, job_id: str, *, after: str | None = None, limit: int = 20
) -> tuple[Sequence[Event], bool]:
    """A page of a job's events, the newest first, and whether there are more.

    Raises:
        NotFound: the job has no event `after`.
    """
    query = select(Event).where(Event.job_id == job_id)
    if after is not None:
        query = query.where(Event.number < await number_of_event(session, job_id, after))
    rows = (await session.scalars(query.order_by(Event.number.desc()).limit(limit + 1))).all()
    return rows[:limit], len(rows) > limit


async def events_since(
    session: AsyncSession, job_id: str, number: int, limit: int = 500
) -> Sequence[Event]:
    """A job's events after that of this number, the oldest first."""
    query = (
        select(Event)
        .where(Event.job_id == job_id, Event.number > number)
        .order_by(Event.number)
        .limit(limit)
    )
    return (await session.scalars(query)).all()


async def number_of_event(session: AsyncSession, job_id: str, event_id: str) -> int:
    """An event's number.

    Raises:
        NotFound: the job has no such event.
    """
    number = await session.scalar(
        select(Event.number).where(Event.job_id == job_id, Event.id == event_id)
    )
    if number is None:
        raise NotFound(f"job {job_id} has no event {event_id[:80]!r}")
    return number


async def states_of(session: AsyncSession, job_ids: Collection[str]) -> dict[str, JobState]:
    """States of the jobs that still exist."""
    latest = select(func.max(Event.number)).where(Event.job_id == Job.id).scalar_subquery()
    query = select(Job.id, Job.status, func.coalesce(latest, 0)).where(Job.id.in_(job_ids))
    return {
        job_id: JobState(status, number)
        for job_id, status, number in (await session.execute(query)).all()
    }


async def list_checkpoints(
    session: AsyncSession, job_id: str, *, after: str | None = None, limit: int = 10
) -> tuple[Sequence[Checkpoint], bool]:
    """A page of a job's checkpoints that can be called, the latest step first, and whether there
    are more.

    Raises:
        NotFound: the job has no checkpoint `after`.
    """
    mine = Checkpoint.job_id == job_id
    query = select(Checkpoint).where(mine, Checkpoint.version_id.is_not(None))
    if after is not None:
        step = await session.scalar(select(Checkpoint.step).where(mine, Checkpoint.id == after))
        if step is None:
            raise NotFound(f"job {job_id} has no checkpoint {after[:80]!r}")
        query = query.where(Checkpoint.step < step)
    rows = (await session.scalars(query.order_by(Checkpoint.step.desc()).limit(limit + 1))).all()
    return rows[:limit], len(rows) > limit


async def unfinished_of(session: AsyncSession, job_ids: Collection[str]) -> set[str]:
    """Those of these jobs that have not ended, of any tenant."""
    return set(
        await session.scalars(select(Job.id).where(Job.id.in_(job_ids), Job.status.not_in(FINAL)))
    )


async def unfinished_jobs_of(session: AsyncSession, tenant_id: str) -> int:
    """Number of a tenant's jobs that are queued, running or paused."""
    query = (
        select(func.count())
        .select_from(Job)
        .where(Job.tenant_id == tenant_id, Job.status.not_in(FINAL))
    )
    return await session.scalar(query) or 0


async def count_jobs(session: AsyncSession) -> dict[str, int]:
    """Number of jobs per status, over all tenants."""
    counted = await session.execute(select(Job.status, func.count()).group_by(Job.status))
    return dict(counted.all())


def _jobs(tenant_id: str | None) -> Select[Job]:
    return select(Job) if tenant_id is None else select(Job).where(Job.tenant_id == tenant_id)


def _with_metadata(
    session: AsyncSession, query: Select[Job], metadata: Mapping[str, str]
) -> Select[Job]:
    # Not Job.metadata_[key]: SQLite would read a key with a quote in it as a path.
    each = func.json_each if session.get_bind().dialect.name == "sqlite" else func.json_each_text
    if not metadata:
        pairs = each(Job.metadata_).table_valued("key", "value")
        return query.where(~exists(select(pairs.c.key)))
    for key, value in metadata.items():
        pairs = each(Job.metadata_).table_valued("key", "value")
        query = query.where(
            exists(select(pairs.c.key).where(pairs.c.key == key, pairs.c.value == value))
        )
    return query
