"""From the model's name that a caller types to the version that answers.

Names: `adapter`, `adapter@version`, `adapter@alias`, each with `owner/` before it where the adapter
is another tenant's, and `ft:...`, the only name of a single version that another tenant has shared.
What is not there and what is not the caller's look the same: None.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from reft_serve.database.adapters import find_version, list_versions, may_use
from reft_serve.database.aliases import list_aliases
from reft_serve.database.models import Adapter, Tenant, Version
from reft_serve.database.names import PRODUCTION
from reft_serve.database.permissions import is_permitted
from reft_serve.errors import NotFound

__all__ = ["Route", "Target", "find_named_version", "resolve"]


@dataclass(frozen=True, slots=True)
class Target:
    """One version, as an engine must know it."""

    version_id: str
    digest: str
    label: str
    """For people: `adapter@number`."""
    positions: str | None = None
    """Its position rule, if that is known."""


@dataclass(frozen=True, slots=True)
class Route:
    """A resolved name: the versions that share its requests, each with the upper end of its part of
    [0, 1].
    """

    shares: tuple[tuple[float, Target], ...]

    def draw(self, point: float) -> Target:
        """The version that takes the request at `point` of [0, 1)."""
        return next((target for end, target in self.shares if point < end), self.shares[-1][1])


async def resolve(session: AsyncSession, tenant_id: str, model: str) -> Route | None:
    """Resolve a `model` name for this tenant."""
    if model.startswith("ft:"):
        usable = or_(may_use(tenant_id), is_permitted(tenant_id))
        named = select(Version).join(Adapter).where(Version.model_id == model, usable)
        version = await session.scalar(named)
        return _only(version) if version is not None else None
    path, _, selector = model.partition("@")
    owner, _, name = path.rpartition("/")
    query = select(Adapter).where(Adapter.name == name, may_use(tenant_id))
    if owner:
        query = query.join(Tenant, Tenant.id == Adapter.tenant_id).where(Tenant.name == owner)
    else:
        query = query.where(Adapter.tenant_id == tenant_id)
    adapter = await session.scalar(query)
    if adapter is None or model.endswith("@"):
        return None
    if not selector:
        return await _shared_out(session, adapter)
    try:
        return _only(await find_version(session, adapter, selector))
    except NotFound:
        return None


async def find_named_version(session: AsyncSession, tenant_id: str, model: str) -> Version | None:
    """The version that a `model` name means for this tenant; of a bare name, production, else the
    latest one.
    """
    route = None if "\0" in model else await resolve(session, tenant_id, model)
    return None if route is None else await session.get(Version, route.shares[-1][1].version_id)


def _target(version: Version) -> Target:
    label = f"{version.adapter.name}@{version.number}"
    return Target(version.id, version.digest, label, (version.facts or {}).get("positions"))


def _only(version: Version) -> Route:
    return Route(((1.0, _target(version)),))


async def _shared_out(session: AsyncSession, adapter: Adapter) -> Route | None:
    """The bare name: aliases with a share take theirs, production (else the latest version) the
    rest.
    """
    aliases = await list_aliases(session, adapter.id)
    rest = next((alias.version for alias in aliases if alias.name == PRODUCTION), None)
    if rest is None:
        rest = next(iter(await list_versions(session, adapter.id, limit=1)), None)
    if rest is None:
        return None
    shares = []
    end = 0.0
    for alias in aliases:
        if alias.share > 0 and alias.name != PRODUCTION:
            end += alias.share
            shares.append((end, _target(alias.version)))
    return Route((*shares, (1.0, _target(rest))))
