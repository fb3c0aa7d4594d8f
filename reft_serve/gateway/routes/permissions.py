"""OpenAI's checkpoint permissions: share one fine-tuned model with other tenants, by its full
name.
"""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Path, Query, Request

from reft_serve.database import audit, permissions
from reft_serve.database.keys import Principal
from reft_serve.gateway.routes.bounded_route import BoundedRoute
from reft_serve.gateway.routes.deps import ServicesDep, actor_of, requires
from reft_serve.gateway.schemas.fields import TENANT_ID
from reft_serve.gateway.schemas.fine_tuning import Page, PermissionOut, PermissionsIn
from reft_serve.gateway.schemas.tenancy import Deleted

__all__ = ["router"]

router = APIRouter(
    prefix="/v1/fine_tuning/checkpoints/{checkpoint}/permissions",
    tags=["fine-tuning"],
    route_class=BoundedRoute,
)
_ID = r"^cp_[0-9a-f]{24}$"
_Caller = Annotated[Principal, Depends(requires("adapters"))]
_Checkpoint = Annotated[
    str,
    Path(
        pattern=r"^(ft:[^/\x00]{1,251}|ftckpt-[A-Za-z0-9]{1,56})$",
        description="A model's full name, or a checkpoint's id.",
    ),
]
_Permission = Annotated[str, Path(pattern=_ID)]


@router.post("")
async def create(
    checkpoint: _Checkpoint,
    body: PermissionsIn,
    request: Request,
    caller: _Caller,
    services: ServicesDep,
) -> Page[PermissionOut]:
    """Share a model with other tenants. A project id is a tenant's id."""
    async with services.database.writing() as session:
        version = await permissions.find_own_version(session, caller.tenant_id, checkpoint)
        created = await permissions.give_permissions(session, version, body.project_ids)
        audit.record(
            session,
            actor_of(request),
            "permission.create",
            version.model_id,
            caller.tenant_id,
            tenants=body.project_ids,
        )
    services.lookup.forget()
    return Page.of([PermissionOut.of(permission) for permission in created], False)


@router.get("")
async def list_all(
    checkpoint: _Checkpoint,
    caller: _Caller,
    services: ServicesDep,
    after: Annotated[str | None, Query(pattern=_ID)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 10,
    order: Literal["ascending", "descending"] = "descending",
    project_id: Annotated[str | None, Query(pattern=TENANT_ID)] = None,
) -> Page[PermissionOut]:
    """List the tenants that a model is shared with."""
    async with services.database.reading() as session:
        version = await permissions.find_own_version(session, caller.tenant_id, checkpoint)
        rows, more = await permissions.list_permissions(
            session,
            version.id,
            after=after,
            limit=limit,
            ascending=order == "ascending",
            tenant_id=project_id,
        )
    return Page.of([PermissionOut.of(permission) for permission in rows], more)


@router.delete("/{permission}")
async def delete(
    checkpoint: _Checkpoint,
    permission: _Permission,
    request: Request,
    caller: _Caller,
    services: ServicesDep,
) -> Deleted:
    """Stop sharing a model with a tenant."""
    async with services.database.writing() as session:
        version = await permissions.find_own_version(session, caller.tenant_id, checkpoint)
        gone = await permissions.delete_permission(session, version.id, permission)
        audit.record(
            session,
            actor_of(request),
            "permission.delete",
            version.model_id,
            caller.tenant_id,
            tenant=gone.tenant_id,
        )
    services.lookup.forget()
    return Deleted(id=permission, object="checkpoint.permission")
