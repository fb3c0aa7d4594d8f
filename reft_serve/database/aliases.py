"""Aliases: names of versions of an adapter, with the share of requests that each takes."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from reft_serve.database.models import Adapter, Alias, Version
from reft_serve.database.names import PRODUCTION, check_alias_name
from reft_serve.errors import Conflict, NotFound, RequestInvalid

__all__ = ["ALIASES_PER_ADAPTER", "delete_alias", "list_aliases", "roll_back", "set_alias"]

ALIASES_PER_ADAPTER = 100


async def list_aliases(session: AsyncSession, adapter_id: str) -> Sequence[Alias]:
    """The aliases of an adapter, by name."""
    return (
        await session.scalars(
            select(Alias).where(Alias.adapter_id == adapter_id).order_by(Alias.name)
        )
    ).all()


async def delete_alias(session: AsyncSession, adapter: Adapter, name: str) -> None:
    """Delete an alias of an adapter; the version stays.

    Raises:
        NotFound: the adapter has no such alias.
    """
    alias = await session.get(Alias, (adapter.id, name))
    if alias is None:
        raise NotFound(f"adapter {adapter.name} has no alias {name!r}")
    await session.delete(alias)


async def set_alias(
    session: AsyncSession,
    adapter: Adapter,
    name: str,
    version: Version,
    traffic: float | None = None,
    *,
    base_name: str = "base",
) -> Alias:
    """Point an alias at a version and remember its previous version.

    Args:
        session: a writing one.
        adapter: the alias's adapter.
        name: the alias's.
        version: what it names from now on.
        traffic: the share of the bare name's requests that it takes; None leaves it as it is.
        base_name: how the base model is called in public.

    Raises:
        RequestInvalid: the name cannot be an alias's, or shares that would add up to more than 1.
    """
    check_alias_name(name, base_name, adapter.name)
    if traffic and name == PRODUCTION:
        raise RequestInvalid(
            "production takes the remaining share; set the shares of the other aliases", "share"
        )
    alias = await session.get(Alias, (adapter.id, name), with_for_update={"of": Alias})
    if alias is None:
        count = await session.scalar(
            select(func.count()).select_from(Alias).where(Alias.adapter_id == adapter.id)
        )
        if (count or 0) >= ALIASES_PER_ADAPTER:
            raise Conflict(
                f"adapter {adapter.name} has {count} aliases, the maximum; delete one first"
            )
        alias = Alias(
            adapter_id=adapter.id, name=name, version_id=version.id, previous_id=None, share=0.0
        )
        session.add(alias)
    elif alias.version_id != version.id:
        alias.previous_id = alias.version_id
        alias.version_id = version.id
    if traffic is not None:
        alias.share = traffic
    await session.flush()
    total = await session.scalar(
        select(func.sum(Alias.share)).where(Alias.adapter_id == adapter.id)
    )
    if (total or 0) > 1 + 1e-9:
        raise RequestInvalid(
            "the shares of this adapter's aliases would add up to more than 1", "share"
        )
    await session.refresh(alias, ["version"])
    return alias


async def roll_back(session: AsyncSession, adapter: Adapter, name: str) -> Alias:
    """Point an alias at its previous version.

    Raises:
        NotFound: there is no such alias.
        Conflict: there is nothing to go back to.
    """
    alias = await session.get(Alias, (adapter.id, name), with_for_update={"of": Alias})
    if alias is None:
        raise NotFound(f"adapter {adapter.name} has no alias {name[:40]!r}")
    if alias.previous_id is None:
        raise Conflict(f"alias {name} of {adapter.name} has no previous version")
    alias.version_id = alias.previous_id
    alias.previous_id = None
    await session.flush()
    await session.refresh(alias, ["version"])
    return alias
