"""Usage totals and the audit log of a tenant."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Response

from reft_serve.database import audit, usage
from reft_serve.database.keys import Principal
from reft_serve.database.models import DAY_MS, now_ms
from reft_serve.errors import NotAllowed
from reft_serve.gateway.routes.bounded_route import BoundedRoute
from reft_serve.gateway.routes.deps import ServicesDep, requires
from reft_serve.gateway.schemas.tenancy import AuditOut, ListOf, UsageOut

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["usage"], route_class=BoundedRoute)
_Caller = Annotated[Principal, Depends(requires("usage"))]
_Group = Literal["tenant", "key", "model", "version", "endpoint", "status"]
_Moment = Annotated[int | None, Query(ge=0, le=10**11, description="Seconds since 1970.")]


@router.get("/usage", responses={200: {"content": {"text/csv": {"schema": {"type": "string"}}}}})
async def totals(
    caller: _Caller,
    services: ServicesDep,
    start_time: _Moment = None,
    end_time: _Moment = None,
    bucket: Literal["hour", "day"] | None = None,
    group_by: Annotated[list[_Group] | None, Query(max_length=6)] = None,
    format: Literal["json", "csv"] = "json",  # noqa: A002 - the parameter's public name
    all_tenants: bool = False,
) -> ListOf[UsageOut]:
    """Sum requests and tokens by bucket and group; default: the last 30 days. `format=csv` returns
    CSV.
    """
    if all_tenants and "admin" not in caller.scopes:
        raise NotAllowed("only an admin can read the usage of other tenants")
    end = end_time * 1000 if end_time is not None else now_ms() + 1
    start = start_time * 1000 if start_time is not None else end - 30 * DAY_MS
    groups = list(dict.fromkeys(group_by or []))
    async with services.database.reading() as session:
        rows = await usage.totals(
            session,
            tenant_id=None if all_tenants else caller.tenant_id,
            start_ms=start,
            end_ms=end,
            bucket=bucket,
            group_by=groups,
        )
    if format == "csv":
        return Response(_csv(rows, groups), media_type="text/csv")  # type: ignore[return-value]
    return ListOf(data=[_out(total) for total in rows])


@router.get("/audit")
async def changes(
    caller: _Caller,
    services: ServicesDep,
    after: Annotated[
        int | None, Query(ge=0, lt=1 << 63, description="The last id of the previous page.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    all_tenants: bool = False,
) -> ListOf[AuditOut]:
    """List the audit log of the tenant's keys, adapters and shares, newest first."""
    if all_tenants and "admin" not in caller.scopes:
        raise NotAllowed("only an admin can read the audit log of other tenants")
    async with services.database.reading() as session:
        rows = await audit.list_audit(
            session, None if all_tenants else caller.tenant_id, after, limit + 1
        )
    return ListOf(data=[AuditOut.of(entry) for entry in rows[:limit]], has_more=len(rows) > limit)


def _out(total: usage.Total) -> UsageOut:
    start = None if total.start_ms is None else total.start_ms // 1000
    return UsageOut(
        start_time=start,
        group=total.group,
        requests=total.requests,
        prompt_tokens=total.prompt_tokens,
        cached_tokens=total.cached_tokens,
        completion_tokens=total.completion_tokens,
    )


def _csv(rows: Sequence[usage.Total], groups: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(
        ["start_time", *groups, "requests", "prompt_tokens", "cached_tokens", "completion_tokens"]
    )
    for total in map(_out, rows):
        counted = (
            total.requests,
            total.prompt_tokens,
            total.cached_tokens,
            total.completion_tokens,
        )
        writer.writerow(
            [total.start_time, *(_cell(total.group[name]) for name in groups), *counted]
        )
    return text.getvalue()


def _cell(value: str | None) -> str:
    """Escape a cell that a spreadsheet would run as a formula; tenants choose names."""
    text = value or ""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
