"""Adapters and their versions, and the tenants that may use them."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, exists, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from reft_serve.database.connection import insert_new
from reft_serve.database.models import Adapter, Alias, Share, Tenant, Version, new_id, now_ms
from reft_serve.database.names import check_adapter_name
from reft_serve.errors import Conflict, ModelNotFound, NotFound, RequestInvalid

__all__ = [
    "SHARES_PER_ADAPTER",
    "Description",
    "add_version",
    "all_digests",
    "delete_adapter",
    "delete_version",
    "describe",
    "find_adapter",
    "find_version",
    "is_used",
    "list_adapters",
    "list_versions",
    "may_use",
    "share",
    "unshare",
    "version_by_id",
]


SHARES_PER_ADAPTER = 1000


@dataclass(frozen=True, slots=True)
class Description:
    """An adapter with its parts. `versions`: the latest first. `shared_with`: names of tenants."""

    adapter: Adapter
    versions: list[Version]
    aliases: list[Alias]
    shared_with: list[str]


def may_use(tenant_id: str) -> ColumnElement[bool]:
    """The condition that an adapter is the tenant's own or is shared with it by a tenant that is
    not disabled.
    """
    shared = select(Share.adapter_id).where(Share.tenant_id == tenant_id)
    able = select(Tenant.id).where(Tenant.disabled_ms.is_(None))
    return or_(Adapter.tenant_id == tenant_id, Adapter.id.in_(shared) & Adapter.tenant_id.in_(able))


async def list_adapters(
    session: AsyncSession, tenant_id: str, *, after: str | None = None, limit: int = 100
) -> tuple[Sequence[Adapter], bool]:
    """A page of a tenant's own adapters by name, and whether there are more; `after` is the id of
    the page before's last.

    Raises:
        NotFound: it has no adapter `after`.
    """
    query = select(Adapter).where(Adapter.tenant_id == tenant_id)
    if after is not None:
        name = await session.scalar(
            select(Adapter.name).where(Adapter.id == after, Adapter.tenant_id == tenant_id)
        )
        if name is None:
            raise NotFound(f"there is no adapter {after[:80]!r}", "after")
        query = query.where(Adapter.name > name)
    rows = (await session.scalars(query.order_by(Adapter.name).limit(limit + 1))).all()
    return rows[:limit], len(rows) > limit


async def describe(
    session: AsyncSession, adapters: Sequence[Adapter], versions: int
) -> list[Description]:
    """Each adapter with its latest `versions` versions, its aliases and the tenants that it is
    shared with, in as many queries for many as for one.
    """
    ids = [adapter.id for adapter in adapters]
    place = func.row_number().over(partition_by=Version.adapter_id, order_by=Version.number.desc())
    ranked = select(Version.id, place.label("place")).where(Version.adapter_id.in_(ids)).subquery()
    latest = select(Version).where(
        Version.id.in_(select(ranked.c.id).where(ranked.c.place <= versions))
    )
    aliases = select(Alias).where(Alias.adapter_id.in_(ids)).order_by(Alias.name)
    shares = select(Share.adapter_id, Tenant.name).join(Tenant, Tenant.id == Share.tenant_id)
    described = {adapter.id: Description(adapter, [], [], []) for adapter in adapters}
    for version in (await session.scalars(latest.order_by(Version.number.desc()))).all():
        described[version.adapter_id].versions.append(version)
    for alias in (await session.scalars(aliases)).all():
        described[alias.adapter_id].aliases.append(alias)
    for adapter_id, name in (
        await session.execute(shares.where(Share.adapter_id.in_(ids)).order_by(Tenant.name))
    ).all():
        described[adapter_id].shared_with.append(name)
    return list(described.values())


async def find_adapter(session: AsyncSession, tenant_id: str, name: str) -> Adapter:
    """A tenant's own adapter, by name.

    Raises:
        NotFound: it has none of this name.
    """
    adapter = await session.scalar(
        select(Adapter).where(Adapter.tenant_id == tenant_id, Adapter.name == name)
    )
    if adapter is None:
        raise NotFound(f"there is no adapter {name[:80]!r}")
    return adapter


async def list_versions(
    session: AsyncSession, adapter_id: str, *, before: int | None = None, limit: int | None = None
) -> Sequence[Version]:
    """The versions of an adapter, the latest first; `before`: only those with smaller numbers."""
    query = (
        select(Version)
        .where(Version.adapter_id == adapter_id)
        .order_by(Version.number.desc())
        .limit(limit)
    )
    if before is not None:
        query = query.where(Version.number < before)
    return (await session.scalars(query)).all()


async def version_by_id(session: AsyncSession, version_id: str, model: str) -> Version:
    """A version by its id.

    Args:
        session: any.
        version_id: of a version that may have been deleted meanwhile.
        model: the name that the caller used, for the error.

    Raises:
        ModelNotFound: it was deleted.
    """
    version = await session.get(Version, version_id)
    if version is None:
        raise ModelNotFound.named(model)
    return version


async def find_version(session: AsyncSession, adapter: Adapter, selector: str) -> Version:
    """A version by its number, or by the alias that names it.

    Raises:
        NotFound: there is none.
    """
    version: Version | None
    if selector.isascii() and selector.isdigit() and len(selector) < 10:
        number = Version.number == int(selector)
        version = await session.scalar(
            select(Version).where(Version.adapter_id == adapter.id, number)
        )
    else:
        alias = await session.get(Alias, (adapter.id, selector))
        version = alias.version if alias is not None else None
    if version is None:
        raise NotFound(f"adapter {adapter.name} has no version {selector[:40]!r}")
    return version


async def add_version(
    session: AsyncSession,
    tenant: Tenant,
    name: str,
    *,
    digest: str,
    base_model: str,
    size_bytes: int,
    source: str,
    facts: dict[str, Any] | None = None,
    base_name: str = "base",
    label: str | None = None,
) -> Version:
    """Record a version whose files the store holds; the adapter is made with its first one.

    Args:
        session: a writing one.
        tenant: the owner.
        name: the adapter's.
        digest: of the version's files.
        base_model: what its manifest calls its base model.
        size_bytes: of the version's files.
        source: "upload" or a job's id.
        facts: what its manifest says, for people.
        base_name: how the base model is called in public.
        label: the end of its `ft:` name; random if none is given.

    Raises:
        RequestInvalid: the name cannot be an adapter's, or is reserved.
    """
    check_adapter_name(name, base_name, tenant.name)
    row = {
        "id": new_id("adp"),
        "tenant_id": tenant.id,
        "name": name,
        "next_number": 1,
        "created_ms": now_ms(),
    }
    await session.execute(
        insert_new(session.get_bind().dialect, Adapter, ["tenant_id", "name"]), [row]
    )
    adapter = await find_adapter(session, tenant.id, name)
    # In the statement, so that two uploads at once cannot take one number.
    step = (
        update(Adapter).where(Adapter.id == adapter.id).values(next_number=Adapter.next_number + 1)
    )
    number = (await session.execute(step.returning(Adapter.next_number))).scalar_one() - 1
    version = Version(
        id=new_id("ver"),
        adapter_id=adapter.id,
        number=number,
        digest=digest,
        base_model=base_model,
        size_bytes=size_bytes,
        source=source,
        facts=facts or {},
        model_id=f"ft:{base_name}:{tenant.name}:{name}:{label or secrets.token_hex(4)}",
    )
    session.add(version)
    await session.flush()
    await session.refresh(version, ["adapter"])
    return version


async def delete_version(session: AsyncSession, version: Version) -> str:
    """Remove a version and give its digest.

    Raises:
        Conflict: an alias names it.
    """
    named = await session.scalar(select(Alias.name).where(Alias.version_id == version.id).limit(1))
    if named is not None:
        raise Conflict(f"the alias {named} points to this version: move or delete the alias first")
    await session.delete(version)
    await session.flush()
    return version.digest


async def delete_adapter(session: AsyncSession, adapter: Adapter) -> set[str]:
    """Remove an adapter with its versions, aliases and shares, and give the digests of the
    versions.
    """
    digests = set(
        (
            await session.scalars(select(Version.digest).where(Version.adapter_id == adapter.id))
        ).all()
    )
    await session.delete(adapter)
    await session.flush()
    return digests


async def all_digests(session: AsyncSession) -> set[str]:
    """The digests of all versions of all tenants."""
    return set(await session.scalars(select(Version.digest).distinct()))


async def is_used(session: AsyncSession, digest: str) -> bool:
    """True if any version of any tenant still has this digest."""
    return bool(await session.scalar(select(exists().where(Version.digest == digest))))


async def share(session: AsyncSession, adapter: Adapter, tenant: Tenant) -> None:
    """Share an adapter with another tenant; a no-op if it is shared already.

    Raises:
        RequestInvalid: it is the tenant's own.
    """
    if tenant.id == adapter.tenant_id:
        raise RequestInvalid("an adapter cannot be shared with its own tenant", "tenant")
    if await session.get(Share, (adapter.id, tenant.id)) is None:
        count = await session.scalar(
            select(func.count()).select_from(Share).where(Share.adapter_id == adapter.id)
        )
        if (count or 0) >= SHARES_PER_ADAPTER:
            raise Conflict(f"adapter {adapter.name} is shared with {count} tenants, the maximum")
        session.add(Share(adapter_id=adapter.id, tenant_id=tenant.id))
        await session.flush()


async def unshare(session: AsyncSession, adapter: Adapter, tenant: Tenant) -> None:
    """Stop sharing an adapter with a tenant.

    Raises:
        NotFound: it was not shared with that tenant.
    """
    row = await session.get(Share, (adapter.id, tenant.id))
    if row is None:
        raise NotFound(f"adapter {adapter.name} is not shared with {tenant.name}")
    await session.delete(row)
    await session.flush()
