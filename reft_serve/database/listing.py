"""The models that a tenant may use, by all of their names, in one query and by pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import CTE, Select, literal, select, tuple_, union_all
from sqlalchemy.ext.asyncio import AsyncSession

from reft_serve.database.adapters import may_use
from reft_serve.database.models import Adapter, Alias, Tenant, Version
from reft_serve.database.permissions import is_permitted
from reft_serve.errors import NotFound

__all__ = ["ListedModel", "list_models"]


@dataclass(frozen=True, slots=True)
class ListedModel:
    """A model's name. `owner`: the tenant's name. `created_ms`: of an alias, when it was last
    changed.
    """

    name: str
    created_ms: int
    owner: str


async def list_models(
    session: AsyncSession, tenant_id: str, *, after: str | None = None, limit: int = 1000
) -> tuple[Sequence[ListedModel], bool]:
    """A page of the names that a tenant can call, and whether there are more: its adapters by name,
    each with its aliases and its versions, the latest first; the adapters that are shared with it;
    the versions that it was given.

    Raises:
        NotFound: it has no model `after`.
    """
    names = _names(tenant_id)
    order = [names.c[column] for column in _ORDER]
    query = select(names.c.name, names.c.created_ms, names.c.owner)
    if after is not None:
        place = (await session.execute(select(*order).where(names.c.name == after))).first()
        if place is None:
            raise NotFound(f"there is no model {after[:200]!r}", "after")
        query = query.where(tuple_(*order) > tuple_(*place))
    rows = [
        ListedModel(*row)
        for row in (await session.execute(query.order_by(*order).limit(limit + 1))).all()
    ]
    return rows[:limit], len(rows) > limit


_ORDER = ("section", "adapter", "owner", "kind", "minor", "name")
_OWN, _SHARED, _GIVEN = range(3)
_ADAPTER, _ALIAS, _VERSION = range(3)


def _names(tenant_id: str) -> CTE:
    mine = Adapter.tenant_id == tenant_id
    usable = may_use(tenant_id) & ~mine
    shown = Tenant.name + "/" + Adapter.name
    version = Version.model_id, Version.created_ms
    return union_all(
        _some(Adapter, Adapter.name, Adapter.created_ms, _OWN, _ADAPTER).where(mine),
        _some(Alias, Adapter.name + "@" + Alias.name, Alias.changed_ms, _OWN, _ALIAS).where(mine),
        _some(Version, *version, _OWN, _VERSION, -Version.number).where(mine),
        _some(Adapter, shown, Adapter.created_ms, _SHARED, _ADAPTER).where(usable),
        _some(Alias, shown + "@" + Alias.name, Alias.changed_ms, _SHARED, _ALIAS).where(usable),
        _some(Version, *version, _GIVEN, _VERSION).where(is_permitted(tenant_id)),
    ).cte("names")


def _some(
    table: type[Adapter | Alias | Version],
    name: Any,
    created_ms: Any,
    section: int,
    kind: int,
    minor: Any = None,
) -> Select[Any]:
    """Names of one sort, with the columns that all are ordered by."""
    place = {
        "section": literal(section),
        "adapter": Adapter.name if section != _GIVEN else literal(""),
    }
    place |= {
        "owner": Tenant.name,
        "kind": literal(kind),
        "minor": literal(0) if minor is None else minor,
    }
    columns = {"name": name, "created_ms": created_ms} | place
    query = select(*(column.label(label) for label, column in columns.items())).select_from(table)
    if table is not Adapter:
        query = query.join(Adapter)
    return query.join(Tenant, Tenant.id == Adapter.tenant_id)
