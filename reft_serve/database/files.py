"""Files of tenants: facts in the database, bytes in the blob store, and never one without the row
that names it.

A row is made (`start_file`) before its blob is written, becomes visible (`complete_file`) after,
and is hidden (`delete_file`) before the blob is removed; `swept_files` finds what a killed process
left between two of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, or_, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncSession

from reft_serve.database.models import File, Job, new_id, now_ms
from reft_serve.errors import Conflict, NotFound

__all__ = [
    "WrittenFile",
    "complete_file",
    "delete_file",
    "delete_files_of",
    "find_file",
    "forget_file",
    "hide_file",
    "key_of_blob",
    "list_files",
    "needed_file",
    "start_file",
    "swept_files",
]

_UNFINISHED = ("queued", "running", "paused")


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A begun file whose blob is written now. `format` and `rows` of a data file: what the check
    has found.
    """

    id: str
    bytes: int
    sha256: str
    format: str | None = None
    rows: int | None = None


def key_of_blob(file_id: str) -> str:
    """Where the blob store has a file's bytes."""
    return f"files/{file_id}"


async def start_file(
    session: AsyncSession,
    tenant_id: str,
    key_id: str | None,
    *,
    filename: str,
    purpose: str,
    expires_ms: int | None,
) -> str:
    """Record that a file's blob is about to be written, and give the file's id. It is not visible
    yet.
    """
    row = File(
        id=new_id("file", "-"),
        tenant_id=tenant_id,
        key_id=key_id,
        filename=filename[:255],
        purpose=purpose,
        status="uploading",
        expires_ms=expires_ms,
    )
    session.add(row)
    await session.flush()
    return row.id


async def complete_file(session: AsyncSession, written: WrittenFile) -> File:
    """Publish a file whose blob is complete.

    Raises:
        Conflict: it was swept up meanwhile, having taken too long.
    """
    values = {"status": "processed", "bytes": written.bytes, "sha256": written.sha256}
    facts = {"format": written.format, "rows": written.rows}
    step = (
        update(File)
        .where(File.id == written.id, File.status == "uploading")
        .values(**values, **facts)
    )
    file: File | None = await session.scalar(step.returning(File))
    if file is None:
        raise Conflict("The upload timed out; upload the file again")
    return file


async def find_file(
    session: AsyncSession, tenant_id: str, file_id: str, *, keep: bool = False
) -> File:
    """A tenant's file.

    Args:
        session: any; a writing one to keep it.
        tenant_id: whose.
        file_id: which.
        keep: it is not deleted before the session's transaction ends, and then by none that sees
            what it has written.

    Raises:
        NotFound: it has none of this id, or it has expired.
    """
    query = select(File).where(File.id == file_id, *_seen(tenant_id))
    file = await session.scalar(query.with_for_update(read=True) if keep else query)
    if file is None:
        raise NotFound(f"there is no file {file_id[:80]!r}")
    return file


async def needed_file(session: AsyncSession, file_id: str) -> File:
    """A file that an unfinished job needs, which is kept for it even after it has expired.

    Raises:
        NotFound: there is none of this id.
    """
    file = await session.get(File, file_id)
    if file is None or file.status != "processed":
        raise NotFound(f"there is no file {file_id[:80]!r}")
    return file


async def list_files(
    session: AsyncSession,
    tenant_id: str,
    *,
    after: str | None = None,
    limit: int = 10_000,
    ascending: bool = False,
    purpose: str | None = None,
) -> tuple[Sequence[File], bool]:
    """A page of a tenant's files by age, and whether there are more; `after` is the id that the
    page before ended with.

    Raises:
        NotFound: there is no file `after`.
    """
    query = select(File).where(*_seen(tenant_id))
    if purpose is not None:
        query = query.where(File.purpose == purpose)
    place = tuple_(File.created_ms, File.id)
    if after is not None:
        last = await session.scalar(
            select(File).where(File.id == after, File.tenant_id == tenant_id)
        )
        if last is None:
            raise NotFound(f"there is no file {after[:80]!r}")
        point = tuple_(last.created_ms, last.id)
        query = query.where(place > point if ascending else place < point)
    order = (File.created_ms, File.id) if ascending else (File.created_ms.desc(), File.id.desc())
    rows = (await session.scalars(query.order_by(*order).limit(limit + 1))).all()
    return rows[:limit], len(rows) > limit


async def delete_file(session: AsyncSession, tenant_id: str, file_id: str) -> File:
    """Hide a file for good; then its blob is to be removed, and the row by `forget_file`.

    Raises:
        NotFound: the tenant has none of this id.
        Conflict: a job that has not ended needs it.
    """
    query = select(File).where(File.id == file_id, *_seen(tenant_id)).with_for_update()
    file = await session.scalar(query)
    if file is None:
        raise NotFound(f"there is no file {file_id[:80]!r}")
    user = await session.scalar(
        select(Job.id).where(_uses(file_id), Job.status.in_(_UNFINISHED)).limit(1)
    )
    if user is not None:
        raise Conflict(
            f"job {user} uses this file: cancel the job first, or wait until it has ended"
        )
    file.status = "deleted"
    await session.flush()
    return file


async def hide_file(session: AsyncSession, file_id: str) -> None:
    """Hide a file for good that was begun and will not be completed."""
    await session.execute(
        update(File).where(File.id == file_id, File.status == "uploading").values(status="deleted")
    )


async def delete_files_of(session: AsyncSession, tenant_id: str) -> None:
    """Hide every file of a tenant for good, as `delete_file` does."""
    await session.execute(update(File).where(File.tenant_id == tenant_id).values(status="deleted"))


async def swept_files(
    session: AsyncSession, uploading_since_ms: int, limit: int = 100
) -> Sequence[str]:
    """Ids of files whose blobs are to be removed: deleted, expired and needed by no job, or begun
    before `uploading_since_ms` and never completed. They are hidden for good by this.
    """
    needed = select(Job.id).where(
        Job.status.in_(_UNFINISHED),
        or_(Job.training_file_id == File.id, Job.validation_file_id == File.id),
    )
    expired = (File.expires_ms <= now_ms()) & ~needed.exists()
    lost = (File.status == "uploading") & (File.created_ms < uploading_since_ms)
    query = (
        select(File)
        .where(or_(File.status == "deleted", lost, expired))
        .order_by(File.created_ms)
        .limit(limit)
    )
    rows = (await session.scalars(query.with_for_update(skip_locked=True))).all()
    for file in rows:
        file.status = "deleted"
    await session.flush()
    return [file.id for file in rows]


async def forget_file(session: AsyncSession, file_id: str) -> None:
    """Remove the row of a hidden file whose blob is gone."""
    file = await session.get(File, file_id)
    if file is not None and file.status == "deleted":
        await session.delete(file)
        await session.flush()


def _seen(tenant_id: str) -> tuple[ColumnElement[bool], ...]:
    alive = or_(File.expires_ms.is_(None), File.expires_ms > now_ms())
    return (File.tenant_id == tenant_id, File.status == "processed", alive)


def _uses(file_id: str) -> ColumnElement[bool]:
    return or_(Job.training_file_id == file_id, Job.validation_file_id == file_id)
