"""OpenAI's models: those that the caller may use, and no others."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request

from reft_serve.database import adapters, audit, permissions
from reft_serve.database.keys import Principal
from reft_serve.database.models import Adapter, Version
from reft_serve.errors import ModelNotFound, NotAllowed
from reft_serve.gateway.bounded_route import BoundedRoute
from reft_serve.gateway.edge import requires
from reft_serve.gateway.publishing import retire
from reft_serve.gateway.routes.actors import actor_of
from reft_serve.gateway.schemas import Deleted, ListOf, ModelOut
from reft_serve.gateway.services import Services, services_of

__all__ = ["router"]

router = APIRouter(prefix="/v1/models", tags=["models"], route_class=BoundedRoute)
_Caller = Annotated[Principal, Depends(requires("models"))]
_Services = Annotated[Services, Depends(services_of)]


@router.get("")
async def list_models(caller: _Caller, services: _Services) -> ListOf[ModelOut]:
    """The base model, the caller's adapters, and what is shared with it."""
    found = [_base(services)]
    async with services.database.reading() as session:
        for adapter in await adapters.list_adapters(session, caller.tenant_id, shared=True):
            name = _public(adapter, caller)
            found.append(_model(name, adapter.created_ms, adapter))
            for alias in await adapters.list_aliases(session, adapter.id):
                found.append(_model(f"{name}@{alias.name}", alias.changed_ms, adapter))
            if adapter.tenant_id == caller.tenant_id:
                versions = await adapters.list_versions(session, adapter.id)
                found += [_model(version.model_id, version.created_ms, adapter) for version in versions]
        given = await permissions.permitted_versions(session, caller.tenant_id)
        found += [_model(version.model_id, version.created_ms, version.adapter) for version in given]
    return ListOf(data=found)


@router.get("/{model:path}")
async def get_model(model: str, caller: _Caller, services: _Services) -> ModelOut:
    """One model, by any of its names."""
    target = await services.directory.target(caller, model)
    if target is None:
        return _base(services)
    async with services.database.reading() as session:
        version = await session.get(Version, target.version_id)
    if version is None:
        raise ModelNotFound(f"The model {model[:200]!r} does not exist or you do not have access to it.")
    return _model(model, version.created_ms, version.adapter)


@router.delete("/{model:path}")
async def delete_model(model: str, request: Request, caller: _Caller, services: _Services) -> Deleted:
    """Delete an adapter of the caller's with all its versions (`adapter`), or one version (`adapter@3`, `ft:...`)."""
    if "adapters" not in caller.scopes:
        raise NotAllowed("this API key may not do this: it lacks the scope 'adapters'")
    target = await services.directory.target(caller, model)
    if target is None:
        raise NotAllowed("the base model cannot be deleted")
    async with services.database.writing() as session:
        version = await session.get(Version, target.version_id)
        if version is None or version.adapter.tenant_id != caller.tenant_id:
            raise ModelNotFound(f"The model {model[:200]!r} does not exist or you do not have access to it.")
        whole = not model.startswith("ft:") and "@" not in model
        adapter = version.adapter
        digests = (
            await adapters.delete_adapter(session, adapter)
            if whole
            else {await adapters.delete_version(session, version)}
        )
        what = "adapter.delete" if whole else "version.delete"
        audit.record(session, actor_of(request), what, model[:255], caller.tenant_id)
    services.directory.forget()
    services.later(retire(services, digests))
    return Deleted(id=model, object="model")


def _base(services: Services) -> ModelOut:
    return ModelOut(id=services.settings.base_model, created=0, owned_by="reft-serve")


def _public(adapter: Adapter, caller: Principal) -> str:
    return adapter.name if adapter.tenant_id == caller.tenant_id else f"{adapter.tenant.name}/{adapter.name}"


def _model(name: str, created_ms: int, adapter: Adapter) -> ModelOut:
    return ModelOut(id=name, created=created_ms // 1000, owned_by=adapter.tenant.name)
