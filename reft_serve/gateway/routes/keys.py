"""The caller's tenant and its API keys."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import Field

from reft_serve.database import audit, keys
from reft_serve.database.keys import Principal
from reft_serve.database.tenants import find_tenant
from reft_serve.errors import Conflict, NotAllowed
from reft_serve.gateway.routes.bounded_route import BoundedRoute
from reft_serve.gateway.routes.deps import ServicesDep, actor_of, caller_of, requires
from reft_serve.gateway.schemas.tenancy import KeyIn, KeyOut, ListOf, NewKeyOut, TenantOut
from reft_serve.gateway.services import Services

__all__ = ["make_key", "router"]

router = APIRouter(prefix="/v1", tags=["keys"], route_class=BoundedRoute)
_Caller = Annotated[Principal, Depends(requires("keys"))]
_ID = r"^key_[0-9a-f]{24}$"
_Key = Annotated[str, Path(pattern=_ID)]


@router.get("/tenant")
async def tenant(
    caller: Annotated[Principal, Depends(caller_of)], services: ServicesDep
) -> TenantOut:
    """Get the tenant that the caller's key belongs to."""
    async with services.database.reading() as session:
        return TenantOut.of(await find_tenant(session, caller.tenant_id))


@router.post("/keys", status_code=201)
async def create(
    body: KeyIn, request: Request, caller: _Caller, services: ServicesDep
) -> NewKeyOut:
    """Create an API key for the caller's tenant, with at most the scopes, limits and lifetime of
    the caller's key. Only this response contains the secret.
    """
    _check_rank(caller, body.role)
    return await make_key(services, request, caller, caller.tenant_id, body)


@router.get("/keys")
async def list_all(
    caller: _Caller,
    services: ServicesDep,
    after: Annotated[
        str | None, Query(pattern=_ID, description="The last id of the previous page.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> ListOf[KeyOut]:
    """List the tenant's keys, oldest first, without their secrets."""
    async with services.database.reading() as session:
        rows = await keys.list_keys(session, caller.tenant_id, after=after, limit=limit + 1)
    return ListOf(
        data=[KeyOut(**KeyOut.fields_of(key)) for key in rows[:limit]], has_more=len(rows) > limit
    )


@router.delete("/keys/{key}")
async def revoke(key: _Key, request: Request, caller: _Caller, services: ServicesDep) -> KeyOut:
    """Revoke a key immediately."""
    async with services.database.writing() as session:
        row = await keys.find_key(session, caller.tenant_id, key)
        if row.id == caller.key_id:
            raise Conflict("a key cannot revoke itself: use another key, or rotate it")
        _check_rank(caller, row.role)
        keys.revoke_key(row)
        audit.record(session, actor_of(request), "key.revoke", key, caller.tenant_id)
    services.lookup.forget()
    return KeyOut(**KeyOut.fields_of(row))


@router.post("/keys/{key}/rotate", status_code=201)
async def rotate(
    key: _Key,
    request: Request,
    caller: _Caller,
    services: ServicesDep,
    overlap_seconds: Annotated[int, Field(ge=0, le=30 * 86400)] = 0,
) -> NewKeyOut:
    """Replace a key. The old one stays valid for `overlap_seconds`."""
    async with services.database.writing() as session:
        old = await keys.find_key(session, caller.tenant_id, key)
        _check_rank(caller, old.role)
        _check_scopes(caller, keys.scopes_of(old.role, old.scopes))  # type: ignore[arg-type]
        keys.check_rotation(caller, old)
        if overlap_seconds:  # else the new key takes the place of the old one
            most = services.settings.limits.merged(caller.limits).keys
            await keys.check_count(session, old.tenant, most)
        new, secret = await keys.rotate_key(session, old, overlap_seconds)
        audit.record(session, actor_of(request), "key.rotate", key, caller.tenant_id, new=new.id)
    services.lookup.forget()
    return NewKeyOut(secret=secret, **KeyOut.fields_of(new))


async def make_key(
    services: Services, request: Request, caller: Principal, tenant_id: str, body: KeyIn
) -> NewKeyOut:
    """Create a key. In the caller's own tenant, or with role admin, it gets at most the caller's
    scopes and limits.
    """
    expires_ms = None if body.expires_at is None else body.expires_at * 1000
    limits: dict[str, Any] = body.limits.model_dump(exclude_none=True)
    async with services.database.writing() as session:
        owner = await find_tenant(session, tenant_id)
        if owner.id == caller.tenant_id or body.role == "admin":
            _check_scopes(caller, keys.scopes_of(body.role, body.scopes))
            expires_ms = keys.end_within(caller, expires_ms)
            limits = keys.limits_within(caller, limits)
        await keys.check_count(session, owner, services.settings.limits.merged(owner.limits).keys)
        key, secret = await keys.create_key(
            session, owner, body.role, body.name, body.scopes, expires_ms, limits
        )
        audit.record(
            session,
            actor_of(request),
            "key.create",
            key.id,
            owner.id,
            role=body.role,
            name=body.name,
        )
    return NewKeyOut(secret=secret, **KeyOut.fields_of(key))


def _check_rank(caller: Principal, role: str) -> None:
    """Reject a key of a higher role than the caller's: an owner could revoke the operator's
    monitoring key.
    """
    if not keys.ROLES[role] <= keys.ROLES[caller.role]:  # type: ignore[index]
        raise NotAllowed(f"only an admin can create, rotate or revoke a key of role {role}")


def _check_scopes(caller: Principal, scopes: frozenset[str]) -> None:
    """Reject scopes beyond the caller's: creating or rotating a key must not widen access."""
    beyond = scopes - caller.scopes
    if beyond:
        raise NotAllowed(
            f"this API key lacks the scopes {', '.join(sorted(beyond))}, so it cannot grant them: "
            "request fewer"
        )
