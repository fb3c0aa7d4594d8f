"""Tenants: made, found, changed, removed."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from reft_serve.database.files import delete_files_of
from reft_serve.database.models import Adapter, Tenant, Version, new_id, now_ms
from reft_serve.errors import Conflict, NotFound, RequestInvalid

__all__ = [
    "TENANT_NAME",
    "change_tenant",
    "create_tenant",
    "delete_tenant",
    "find_tenant",
    "list_tenants",
]

TENANT_NAME = r"^[a-z0-9][a-z0-9-]{0,62}$"


async def create_tenant(
    session: AsyncSession, name: str, limits: dict[str, Any] | None = None
) -> Tenant:
    """Make a tenant with its own cache salt.

    Raises:
        RequestInvalid: the name is not one.
        Conflict: it is taken.
    """
    if not re.match(TENANT_NAME, name):
        raise RequestInvalid(
            f"{name[:80]!r} is not a valid tenant name: up to 63 of a-z, 0-9 and '-'", "name"
        )
    tenant = Tenant(
        id=new_id("tnt"), name=name, cache_salt=secrets.token_urlsafe(32), limits=limits or {}
    )
    session.add(tenant)
    try:
        await session.flush()
    except IntegrityError as exc:
        raise Conflict(f"there is a tenant {name} already") from exc
    return tenant


async def find_tenant(session: AsyncSession, id_or_name: str) -> Tenant:
    """The tenant of this id or this name.

    Raises:
        NotFound: there is none.
    """
    tenant = await session.scalar(
        select(Tenant).where((Tenant.id == id_or_name) | (Tenant.name == id_or_name))
    )
    if tenant is None:
        raise NotFound(f"there is no tenant {id_or_name[:80]!r}")
    return tenant


async def list_tenants(
    session: AsyncSession, *, after: str | None = None, limit: int | None = None
) -> Sequence[Tenant]:
    """Tenants by name; `after` is the id that the page before ended with.

    Raises:
        NotFound: there is no tenant `after`.
    """
    query = select(Tenant).order_by(Tenant.name).limit(limit)
    if after is not None:
        query = query.where(Tenant.name > (await find_tenant(session, after)).name)
    return (await session.scalars(query)).all()


def change_tenant(
    tenant: Tenant, *, limits: dict[str, Any] | None = None, disabled: bool | None = None
) -> None:
    """Replace a tenant's limits, disable it or enable it; None changes nothing."""
    if limits is not None:
        tenant.limits = limits
    if disabled is not None:
        tenant.disabled_ms = now_ms() if disabled else None


async def delete_tenant(session: AsyncSession, tenant: Tenant) -> set[str]:
    """Remove a tenant with its keys, adapters, jobs and files (its usage stays), and give the
    digests that it had in the store. The blobs of the files are left to the sweep.
    """
    mine = select(Version.digest).join(Adapter).where(Adapter.tenant_id == tenant.id)
    digests = set((await session.scalars(mine)).all())
    await delete_files_of(session, tenant.id)
    await session.delete(tenant)
    await session.flush()
    return digests
