"""Storage limits of a tenant, enforced where something is recorded: adapters, versions, files and
their bytes.

Every way in calls `check_room` in the transaction that records something, after `lock_room`: so of
two at once the second one sees the first.
"""

from __future__ import annotations

from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from reft_serve.config import TenantLimits
from reft_serve.database.models import Adapter, File, Job, Version
from reft_serve.errors import RateLimited

__all__ = [
    "VERSIONS_PER_ADAPTER",
    "check_adapters_of_jobs",
    "check_room",
    "lock_room",
    "stored_bytes",
]

VERSIONS_PER_ADAPTER = 10_000
_WAIT_SECONDS = 60.0
_FINAL = ("succeeded", "failed", "cancelled")


async def lock_room(session: AsyncSession, tenant_id: str) -> None:
    """Lock a tenant's storage until the session's transaction ends. Take this lock before any
    other.
    """
    # a writer of SQLite holds everything already
    if session.get_bind().dialect.name == "postgresql":
        name = f"storage:{tenant_id}"
        await session.execute(
            text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))"), {"name": name}
        )


async def stored_bytes(session: AsyncSession, tenant_id: str) -> int:
    """The bytes of all versions and files of a tenant."""
    versions = (
        select(func.sum(Version.size_bytes)).join(Adapter).where(Adapter.tenant_id == tenant_id)
    )
    files = select(func.sum(File.bytes)).where(
        File.tenant_id == tenant_id, File.status == "processed"
    )
    return int(await session.scalar(versions) or 0) + int(await session.scalar(files) or 0)


async def check_room(
    session: AsyncSession,
    tenant_id: str,
    limits: TenantLimits,
    *,
    size: int = 0,
    adapter: str | None = None,
    versions: int = 0,
    files: int = 0,
) -> None:
    """Check that a tenant may store this as well.

    Args:
        session: any; one that has called `lock_room`, if the result must hold until its transaction
            ends.
        tenant_id: whose.
        limits: the tenant's.
        size: bytes to be added.
        adapter: its adapter's name, which may be new.
        versions: how many versions of that adapter come.
        files: how many files come.

    Raises:
        RateLimited: a limit is used up.
    """
    if adapter is not None:
        await _check_adapter(session, tenant_id, limits, adapter, versions)
    if files and limits.files is not None:
        kept = File.status.in_(("processed", "uploading"))
        mine = select(func.count()).select_from(File).where(File.tenant_id == tenant_id, kept)
        if (await session.scalar(mine) or 0) + files > limits.files:
            raise _used_up(f"{limits.files} files", "delete one first")
    if (
        limits.storage_bytes is not None
        and await stored_bytes(session, tenant_id) + size > limits.storage_bytes
    ):
        raise _used_up(
            f"{limits.storage_bytes} bytes of storage", "delete a file or a version first"
        )


async def check_adapters_of_jobs(
    session: AsyncSession, tenant_id: str, limits: TenantLimits, adapter: str | None
) -> None:
    """Check that a tenant may have one more job that creates an adapter (None: under a new name),
    counting those of its unfinished jobs.

    Raises:
        RateLimited: a limit is used up.
    """
    if limits.adapters is None:
        return
    unfinished = select(Job.adapter).where(Job.tenant_id == tenant_id, Job.status.not_in(_FINAL))
    names = select(Adapter.name).where(Adapter.tenant_id == tenant_id).union(unfinished).subquery()
    count = await session.scalar(select(func.count()).select_from(names)) or 0
    is_there = adapter is not None and await session.scalar(
        select(names.c.name).where(names.c.name == adapter)
    )
    if not is_there and count >= limits.adapters:
        raise _used_up(f"{limits.adapters} adapters", "delete one first, or wait for a job to end")


async def _check_adapter(
    session: AsyncSession, tenant_id: str, limits: TenantLimits, adapter: str, versions: int
) -> None:
    adapter_id = await session.scalar(
        select(Adapter.id).where(Adapter.tenant_id == tenant_id, Adapter.name == adapter)
    )
    if adapter_id is not None:
        query = select(func.count()).select_from(Version).where(Version.adapter_id == adapter_id)
        if (await session.scalar(query) or 0) + versions > VERSIONS_PER_ADAPTER:
            raise _used_up(
                f"{VERSIONS_PER_ADAPTER} versions of adapter {adapter}", "delete one first"
            )
    elif limits.adapters is not None:
        query = select(func.count()).select_from(Adapter).where(Adapter.tenant_id == tenant_id)
        if (await session.scalar(query) or 0) + 1 > limits.adapters:
            raise _used_up(f"{limits.adapters} adapters", "delete one first")


def _used_up(limit: str, advice: str) -> RateLimited:
    return RateLimited(f"the limit of {limit} is used up; {advice}", _WAIT_SECONDS)
