"""The audit log: written in the transaction of the recorded change, never changed after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from reft_serve.database.models import AuditEntry

__all__ = ["Actor", "list_audit", "record"]


@dataclass(frozen=True, slots=True)
class Actor:
    """The actor of a change. `key_id` is None for the operator's command line."""

    key_id: str | None = None
    request_id: str | None = None


def record(
    session: AsyncSession,
    actor: Actor,
    action: str,
    subject: str,
    tenant_id: str | None,
    **details: object,
) -> None:
    """Add an entry to the session's transaction. `action` is noun.verb, for instance
    `key.create`.
    """
    session.add(
        AuditEntry(
            tenant_id=tenant_id,
            key_id=actor.key_id,
            request_id=actor.request_id,
            action=action,
            subject=subject,
            details=details,
        )
    )


async def list_audit(
    session: AsyncSession, tenant_id: str | None, after: int | None = None, limit: int = 100
) -> Sequence[AuditEntry]:
    """The latest entries first, of one tenant or (None) of all; `after` is the id that the page
    before ended with.
    """
    query = select(AuditEntry).order_by(AuditEntry.id.desc()).limit(limit)
    if tenant_id is not None:
        query = query.where(AuditEntry.tenant_id == tenant_id)
    if after is not None:
        query = query.where(AuditEntry.id < after)
    return (await session.scalars(query)).all()
