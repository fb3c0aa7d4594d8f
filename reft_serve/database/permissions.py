"""Permissions: that another tenant may use one version, by its full name and no other."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement, func, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from reft_serve.database.connection import insert_new
from reft_serve.database.models import (
    Adapter,
    Checkpoint,
    Permission,
    Tenant,
    Version,
    new_id,
    now_ms,
)
from reft_serve.errors import Conflict, NotFound, RequestInvalid

__all__ = [
    "PERMISSIONS_PER_VERSION",
    "delete_permission",
    "find_own_version",
    "give_permissions",
    "is_permitted",
    "list_permissions",
]


PERMISSIONS_PER_VERSION = 1000


def is_permitted(tenant_id: str) -> ColumnElement[bool]:
    """The condition that a version was given to the tenant by one that is not disabled."""
    permitted = select(Permission.version_id).where(Permission.tenant_id == tenant_id)
    able = (
        select(Adapter.id)
        .join(Tenant, Tenant.id == Adapter.tenant_id)
        .where(Tenant.disabled_ms.is_(None))
    )
    return Version.id.in_(permitted) & Version.adapter_id.in_(able)


async def find_own_version(session: AsyncSession, tenant_id: str, name: str) -> Version:
    """A version of the tenant's own, by its full name (`ft:...`) or by its checkpoint's id.

    Raises:
        NotFound: it has none.
    """
    mine = (
        select(Version)
        .join(Adapter, Adapter.id == Version.adapter_id)
        .where(Adapter.tenant_id == tenant_id)
    )
    checkpoint = select(Checkpoint.version_id).where(Checkpoint.id == name).scalar_subquery()
    version = await session.scalar(
        mine.where((Version.model_id == name) | (Version.id == checkpoint))
    )
    if version is None:
        raise NotFound(f"there is no fine-tuned model or checkpoint {name[:200]!r}")
    return version


async def give_permissions(
    session: AsyncSession, version: Version, tenant_ids: Sequence[str]
) -> Sequence[Permission]:
    """Permit tenants to use a version; a no-op for tenants that may already.

    Raises:
        NotFound: one of them does not exist.
        RequestInvalid: one of them owns it.
        Conflict: it would have more than PERMISSIONS_PER_VERSION permissions.
    """
    wanted = list(dict.fromkeys(tenant_ids))
    known = set((await session.scalars(select(Tenant.id).where(Tenant.id.in_(wanted)))).all())
    for tenant_id in wanted:
        if tenant_id not in known:
            raise NotFound(f"there is no tenant {tenant_id[:80]!r}", "project_ids")
        if tenant_id == version.adapter.tenant_id:
            raise RequestInvalid("a model cannot be shared with its own tenant", "project_ids")
    others = select(func.count()).select_from(Permission).where(Permission.version_id == version.id)
    count = await session.scalar(others.where(Permission.tenant_id.not_in(wanted))) or 0
    if count + len(wanted) > PERMISSIONS_PER_VERSION:
        raise Conflict(
            f"a model has at most {PERMISSIONS_PER_VERSION} permissions; delete some first"
        )
    rows = [
        {
            "id": new_id("cp"),
            "version_id": version.id,
            "tenant_id": tenant_id,
            "created_ms": now_ms(),
        }
        for tenant_id in wanted
    ]
    await session.execute(
        insert_new(session.get_bind().dialect, Permission, ["version_id", "tenant_id"]), rows
    )
    query = select(Permission).where(
        Permission.version_id == version.id, Permission.tenant_id.in_(wanted)
    )
    return (await session.scalars(query.order_by(Permission.created_ms, Permission.id))).all()


async def list_permissions(
    session: AsyncSession,
    version_id: str,
    *,
    after: str | None = None,
    limit: int = 10,
    ascending: bool = False,
    tenant_id: str | None = None,
) -> tuple[Sequence[Permission], bool]:
    """A page of a version's permissions by age, and whether there are more.

    Raises:
        NotFound: it has no permission `after`.
    """
    query = select(Permission).where(Permission.version_id == version_id)
    if tenant_id is not None:
        query = query.where(Permission.tenant_id == tenant_id)
    place = tuple_(Permission.created_ms, Permission.id)
    if after is not None:
        last = await _find(session, version_id, after)
        point = tuple_(last.created_ms, last.id)
        query = query.where(place > point if ascending else place < point)
    order = (Permission.created_ms, Permission.id)
    query = query.order_by(*(order if ascending else [column.desc() for column in order])).limit(
        limit + 1
    )
    rows = (await session.scalars(query)).all()
    return rows[:limit], len(rows) > limit


async def delete_permission(
    session: AsyncSession, version_id: str, permission_id: str
) -> Permission:
    """Take a permission back, and give what it was.

    Raises:
        NotFound: the version has none of this id.
    """
    permission = await _find(session, version_id, permission_id)
    await session.delete(permission)
    await session.flush()
    return permission


async def _find(session: AsyncSession, version_id: str, permission_id: str) -> Permission:
    query = select(Permission).where(
        Permission.version_id == version_id, Permission.id == permission_id
    )
    permission = await session.scalar(query)
    if permission is None:
        raise NotFound(f"there is no permission {permission_id[:80]!r}")
    return permission
