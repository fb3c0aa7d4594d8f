"""OpenAI's models API, restricted to the models that the caller may use."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request

from reft_serve.database import adapters, audit, listing
from reft_serve.database.keys import Principal
from reft_serve.database.models import Adapter
from reft_serve.errors import ModelNotFound, NotAllowed
from reft_serve.gateway.publishing import retire
from reft_serve.gateway.routes.bounded_route import BoundedRoute
from reft_serve.gateway.routes.deps import ServicesDep, actor_of, requires
from reft_serve.gateway.schemas.tenancy import Deleted, ListOf, ModelOut
from reft_serve.gateway.services import Services

__all__ = ["MODELS_PER_PAGE", "router"]

MODELS_PER_PAGE = 1000
_AFTER = "The last id of the previous page."

router = APIRouter(prefix="/v1/models", tags=["models"], route_class=BoundedRoute)
_Caller = Annotated[Principal, Depends(requires("models"))]


@router.get("")
async def list_models(
    caller: _Caller,
    services: ServicesDep,
    after: Annotated[
        str | None, Query(max_length=400, pattern=r"^[^\x00]+$", description=_AFTER)
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MODELS_PER_PAGE)] = MODELS_PER_PAGE,
) -> ListOf[ModelOut]:
    """List the base model, then every name of the caller's adapters and of adapters shared with
    it.
    """
    base = _base(services)
    listed = [base] if after is None else []
    async with services.database.reading() as session:
        names, more = await listing.list_models(
            session,
            caller.tenant_id,
            after=None if after == base.id else after,
            limit=limit - len(listed),
        )
    listed += [
        ModelOut(id=each.name, created=each.created_ms // 1000, owned_by=each.owner)
        for each in names
    ]
    return ListOf(data=listed, has_more=more)


@router.get("/{model:path}")
async def get_model(model: str, caller: _Caller, services: ServicesDep) -> ModelOut:
    """Get a model by any of its names."""
    target = await services.lookup.target(caller, model)
    if target is None:
        return _base(services)
    async with services.database.reading() as session:
        version = await adapters.version_by_id(session, target.version_id, model)
    return _model(model, version.created_ms, version.adapter)


@router.delete("/{model:path}")
async def delete_model(
    model: str, request: Request, caller: _Caller, services: ServicesDep
) -> Deleted:
    """Delete one of the caller's adapters with all its versions (`adapter`), or one version
    (`adapter@3`, `ft:...`).
    """
    if "adapters" not in caller.scopes:
        raise NotAllowed("this API key lacks the scope 'adapters'")
    target = await services.lookup.target(caller, model)
    if target is None:
        raise NotAllowed("the base model cannot be deleted")
    async with services.database.writing() as session:
        version = await adapters.version_by_id(session, target.version_id, model)
        if version.adapter.tenant_id != caller.tenant_id:
            raise ModelNotFound.named(model)
        whole = not model.startswith("ft:") and "@" not in model
        adapter = version.adapter
        digests = (
            await adapters.delete_adapter(session, adapter)
            if whole
            else {await adapters.delete_version(session, version)}
        )
        what = "adapter.delete" if whole else "version.delete"
        audit.record(session, actor_of(request), what, model[:255], caller.tenant_id)
    services.lookup.forget()
    services.background.spawn(retire(services, digests), caller.tenant_id)
    return Deleted(id=model, object="model")


def _base(services: Services) -> ModelOut:
    return ModelOut(id=services.settings.base_model, created=0, owned_by="reft-serve")


def _model(name: str, created_ms: int, adapter: Adapter) -> ModelOut:
    return ModelOut(id=name, created=created_ms // 1000, owned_by=adapter.tenant.name)
