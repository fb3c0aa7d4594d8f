"""The outcome of a job's run: the worker's result, and the rows that record it in one
transaction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from reft_serve.config import TenantLimits, TrainerSettings
from reft_serve.database import audit, webhooks
from reft_serve.database.adapters import add_version
from reft_serve.database.files import WrittenFile, complete_file
from reft_serve.database.models import Checkpoint, Event, Job, Version, new_id, now_ms
from reft_serve.database.room import check_room, lock_room
from reft_serve.errors import RateLimited

__all__ = [
    "FINAL",
    "MOST_ATTEMPTS",
    "Cancelled",
    "Failed",
    "Level",
    "NewCheckpoint",
    "NewVersion",
    "Outcome",
    "Paused",
    "Status",
    "Succeeded",
    "Wanted",
    "end",
    "fail_after_attempts",
    "fit",
    "pause",
    "publish",
    "put_checkpoint",
    "record_event",
    "requeue",
]

Status = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
Wanted = Literal["none", "pause", "cancel", "yield"]
Level = Literal["info", "warn", "error"]
FINAL: frozenset[Status] = frozenset({"succeeded", "failed", "cancelled"})
MOST_ATTEMPTS: int = TrainerSettings.model_fields["train_attempts"].default
_LABEL = 8


@dataclass(frozen=True, slots=True)
class NewVersion:
    """A version whose files the store holds. `base_model` as its manifest calls it."""

    digest: str
    base_model: str
    size_bytes: int
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NewCheckpoint:
    """A state on the way, with metrics as OpenAI names them (`train_loss`, `valid_loss`,
    `valid_mean_token_accuracy` ...).
    """

    step: int
    metrics: Mapping[str, float]
    version: NewVersion


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The job is done. `result`: the file of its metrics, begun by `files.start_file`, whose blob
    is written.
    """

    version: NewVersion
    checkpoints: Sequence[NewCheckpoint]
    trained_tokens: int
    result: WrittenFile | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """It cannot be done. `message` is for its owner, `traceback` for an admin."""

    code: str
    message: str
    param: str | None = None
    traceback: str | None = None


@dataclass(frozen=True, slots=True)
class Cancelled:
    """It was stopped as was asked."""


@dataclass(frozen=True, slots=True)
class Paused:
    """It was stopped as was asked, and can resume from its last checkpoint."""


Outcome = Succeeded | Failed | Cancelled | Paused


def record_event(
    session: AsyncSession,
    job: Job,
    message: str,
    level: Level = "info",
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Add an event of a job whose row this transaction has locked or made."""
    kind = "message" if metrics is None else "metrics"
    data = None if metrics is None else dict(metrics)
    session.add(
        Event(
            id=new_id("ftevent", "-"),
            job_id=job.id,
            level=level,
            type=kind,
            message=message[:4000],
            data=data,
        )
    )


async def end(
    session: AsyncSession, job: Job, status: Literal["succeeded", "failed", "cancelled"]
) -> None:
    """Bring a job whose row this transaction has locked to its final state: event, audit entry and
    webhooks with it.
    """
    job.status = status
    job.wanted = "none"
    job.worker = None
    job.lease_until_ms = None
    job.finished_ms = now_ms()
    job.estimated_finish_ms = None
    if status == "succeeded":
        record_event(session, job, "The job has successfully completed")
    elif status == "cancelled":
        record_event(session, job, "The job was cancelled")
    else:
        record_event(
            session,
            job,
            f"The job failed: {(job.error or {}).get('message', 'no reason is known')}",
            "error",
        )
    facts = {"model": job.fine_tuned_model, "code": (job.error or {}).get("code")}
    recorded = {name: value for name, value in facts.items() if value is not None}
    audit.record(
        session, audit.Actor(job.key_id), f"job.{status}", job.id, job.tenant_id, **recorded
    )
    await webhooks.enqueue(session, job.tenant_id, f"fine_tuning.job.{status}", {"id": job.id})


async def fail_after_attempts(session: AsyncSession, job: Job, why: str) -> None:
    """Fail a job that has used up its attempts; `why` is how the last one ended."""
    sentence = (
        f"The job failed after {job.attempts} attempts ({why}). It will not be retried; the "
        "operator has the details."
    )
    job.error = {"code": "too_many_attempts", "message": sentence, "param": None}
    await end(session, job, "failed")


def requeue(job: Job) -> None:
    """Return a job to the queue without a worker; behind the waiting jobs if it yielded to one of
    them.
    """
    waits_since = now_ms() if job.wanted == "yield" else None
    job.status = "queued"
    job.worker = None
    job.lease_until_ms = waits_since
    job.estimated_finish_ms = None
    job.wanted = "none" if job.wanted == "yield" else job.wanted


def pause(session: AsyncSession, job: Job) -> None:
    """Pause a job until it is resumed."""
    requeue(job)
    job.status = "paused"
    job.wanted = "none"
    job.attempts = 0
    record_event(session, job, "The job is paused; resume it to continue from its last checkpoint")


async def publish(session: AsyncSession, job: Job, outcome: Succeeded) -> None:
    """Make the job's versions, its own the last, so that the adapter's bare name means that one."""
    label = job.id[-_LABEL:]
    for checkpoint in sorted(outcome.checkpoints, key=lambda each: each.step):
        name = f"{label}:ckpt-step-{checkpoint.step}"
        version = await _add_version(session, job, checkpoint.version, name)
        await put_checkpoint(session, job, checkpoint.step, checkpoint.metrics, version.id)
    version = await _add_version(session, job, outcome.version, label)
    job.version_id = version.id
    job.fine_tuned_model = version.model_id
    job.trained_tokens = outcome.trained_tokens
    job.step = max(job.step, job.steps or 0)
    if outcome.result is not None:
        job.result_file_id = (await complete_file(session, outcome.result)).id
    record_event(session, job, f"New fine-tuned model created: {version.model_id}")


async def put_checkpoint(
    session: AsyncSession, job: Job, step: int, metrics: Mapping[str, float], version_id: str | None
) -> None:
    """Record a checkpoint; a job that went back to an earlier one comes by the same step again."""
    checkpoint = await session.scalar(
        select(Checkpoint).where(Checkpoint.job_id == job.id, Checkpoint.step == step)
    )
    if checkpoint is None:
        checkpoint = Checkpoint(id=new_id("ftckpt", "-"), job_id=job.id, step=step)
        session.add(checkpoint)
    checkpoint.metrics = dict(metrics)
    checkpoint.version_id = version_id


async def fit(
    session: AsyncSession, job: Job, outcome: Succeeded, limits: TenantLimits
) -> Succeeded | Failed:
    """Select the part of a run's result that fits into the tenant's limits, latest checkpoints
    first. It is a failure if not even the result itself fits.

    Args:
        session: a writing one.
        job: the job, whose row this transaction has locked.
        outcome: all that the run has made.
        limits: of tenants without limits.
    """
    limits = limits.merged(job.tenant.limits)
    await lock_room(session, job.tenant_id)
    size = outcome.version.size_bytes + (outcome.result.bytes if outcome.result is not None else 0)
    kept: list[NewCheckpoint] = []
    try:
        await check_room(session, job.tenant_id, limits, size=size, adapter=job.adapter, versions=1)
    except RateLimited as exc:
        return Failed("limit_reached", f"The result cannot be published: {exc}")
    for checkpoint in sorted(outcome.checkpoints, key=lambda each: -each.step):
        size += checkpoint.version.size_bytes
        try:
            count = len(kept) + 2
            await check_room(
                session, job.tenant_id, limits, size=size, adapter=job.adapter, versions=count
            )
        except RateLimited as exc:
            left = len(outcome.checkpoints) - len(kept)
            record_event(
                session,
                job,
                f"{left} of {len(outcome.checkpoints)} checkpoints were not published: {exc}",
                "warn",
            )
            break
        kept.append(checkpoint)
    return replace(outcome, checkpoints=kept)


async def _add_version(session: AsyncSession, job: Job, new: NewVersion, label: str) -> Version:
    return await add_version(
        session,
        job.tenant,
        job.adapter,
        digest=new.digest,
        base_model=new.base_model,
        size_bytes=new.size_bytes,
        source=job.id,
        facts=dict(new.facts),
        base_name=job.model,
        label=label,
    )
