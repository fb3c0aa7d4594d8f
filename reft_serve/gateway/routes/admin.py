"""Admin routes for tenants and their keys, the jobs of all tenants, and the engines."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Path, Query, Request

from reft_serve.database import audit, tenants
from reft_serve.database.jobs import fine_tuning
from reft_serve.database.jobs.outcomes import Status
from reft_serve.errors import Conflict
from reft_serve.gateway.engines.engine import Engine
from reft_serve.gateway.publishing import retire
from reft_serve.gateway.routes.bounded_route import BoundedRoute
from reft_serve.gateway.routes.deps import ServicesDep, actor_of, caller_of, requires
from reft_serve.gateway.routes.fine_tuning import JOB_ID
from reft_serve.gateway.routes.keys import make_key
from reft_serve.gateway.routes.metrics import EngineName
from reft_serve.gateway.schemas.fields import TENANT_ID, TENANT_ID_OR_NAME
from reft_serve.gateway.schemas.fine_tuning import JobAdminOut, Page
from reft_serve.gateway.schemas.tenancy import (
    Deleted,
    EngineOut,
    KeyIn,
    ListOf,
    NewKeyOut,
    TenantIn,
    TenantOut,
    TenantPatch,
)
from reft_serve.gateway.services import Services

__all__ = ["router"]

router = APIRouter(
    prefix="/v1/admin",
    tags=["admin"],
    dependencies=[Depends(requires("admin"))],
    route_class=BoundedRoute,
)
_Tenant = Annotated[str, Path(pattern=TENANT_ID_OR_NAME, description="Id or name of a tenant.")]
_Job = Annotated[str, Path(pattern=JOB_ID)]


@router.post("/tenants", status_code=201)
async def create_tenant(body: TenantIn, request: Request, services: ServicesDep) -> TenantOut:
    """Create a tenant."""
    async with services.database.writing() as session:
        tenant = await tenants.create_tenant(
            session, body.name, body.limits.model_dump(exclude_none=True)
        )
        audit.record(session, actor_of(request), "tenant.create", tenant.name, tenant.id)
    return TenantOut.of(tenant)


@router.get("/tenants")
async def list_tenants(
    services: ServicesDep,
    after: Annotated[
        str | None, Query(pattern=TENANT_ID, description="The last id of the previous page.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
) -> ListOf[TenantOut]:
    """List all tenants by name."""
    async with services.database.reading() as session:
        rows = await tenants.list_tenants(session, after=after, limit=limit + 1)
    return ListOf(
        data=[TenantOut.of(tenant) for tenant in rows[:limit]], has_more=len(rows) > limit
    )


@router.get("/tenants/{tenant}")
async def get_tenant(tenant: _Tenant, services: ServicesDep) -> TenantOut:
    """Get one tenant."""
    async with services.database.reading() as session:
        return TenantOut.of(await tenants.find_tenant(session, tenant))


@router.patch("/tenants/{tenant}")
async def change_tenant(
    tenant: _Tenant, body: TenantPatch, request: Request, services: ServicesDep
) -> TenantOut:
    """Change a tenant's limits, disable it or enable it."""
    async with services.database.writing() as session:
        row = await tenants.find_tenant(session, tenant)
        if body.disabled and row.id == caller_of(request).tenant_id:
            raise Conflict("this would shut yourself out: use another tenant's admin key")
        limits = None if body.limits is None else body.limits.model_dump(exclude_none=True)
        tenants.change_tenant(row, limits=limits, disabled=body.disabled)
        changes = body.model_dump(exclude_none=True)
        audit.record(session, actor_of(request), "tenant.change", row.name, row.id, **changes)
    services.lookup.forget()
    return TenantOut.of(row)


@router.delete("/tenants/{tenant}")
async def delete_tenant(tenant: _Tenant, request: Request, services: ServicesDep) -> Deleted:
    """Delete a tenant with its keys, adapters, files and jobs. Its usage and audit entries are
    kept.
    """
    async with services.database.writing() as session:
        row = await tenants.find_tenant(session, tenant)
        if row.id == caller_of(request).tenant_id:
            raise Conflict("this would shut yourself out: use another tenant's admin key")
        digests = await tenants.delete_tenant(session, row)
        audit.record(session, actor_of(request), "tenant.delete", row.name, row.id)
    services.lookup.forget()
    services.background.spawn(retire(services, digests), row.id)
    return Deleted(id=row.id, object="tenant")


@router.post("/tenants/{tenant}/keys", status_code=201)
async def create_key(
    tenant: _Tenant, body: KeyIn, request: Request, services: ServicesDep
) -> NewKeyOut:
    """Create an API key for a tenant. Only this response contains the secret."""
    return await make_key(services, request, caller_of(request), tenant, body)


@router.get("/jobs", name="list_all")
async def list_jobs(
    services: ServicesDep,
    after: Annotated[str | None, Query(pattern=JOB_ID)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    tenant: Annotated[
        str | None,
        Query(
            pattern=TENANT_ID_OR_NAME, description="Id or name of a tenant; default: all tenants."
        ),
    ] = None,
    status: Annotated[list[Status] | None, Query(max_length=6)] = None,
) -> Page[JobAdminOut]:
    """List the jobs of all tenants or of one, newest first."""
    async with services.database.reading() as session:
        tenant_id = None if tenant is None else (await tenants.find_tenant(session, tenant)).id
        jobs, more = await fine_tuning.list_jobs(
            session, tenant_id, after=after, limit=limit, statuses=status
        )
    return Page.of([JobAdminOut.of(job) for job in jobs], more)


@router.get("/jobs/{job}", name="get")
async def get_job(job: _Job, services: ServicesDep) -> JobAdminOut:
    """Get a job with its worker and the traceback of its failure."""
    async with services.database.reading() as session:
        return JobAdminOut.of(await fine_tuning.find_job(session, None, job))


@router.post("/jobs/{job}/{what}", name="ask")
async def change_job(
    job: _Job, what: Literal["cancel", "pause", "resume"], request: Request, services: ServicesDep
) -> JobAdminOut:
    """Cancel, pause or resume the job of any tenant."""
    async with services.database.writing() as session:
        changed = await fine_tuning.request_change(session, None, job, what)
        audit.record(session, actor_of(request), f"job.{what}", job, changed.tenant_id)
        return JobAdminOut.of(changed)


@router.get("/engines")
async def list_engines(services: ServicesDep) -> ListOf[EngineOut]:
    """List the engines of this gateway and their health."""
    return ListOf(data=[_out(engine) for engine in services.fleet.engines])


@router.post("/engines/{engine}/drain")
async def drain(engine: EngineName, request: Request, services: ServicesDep) -> EngineOut:
    """Send no new requests to an engine; requests in progress finish."""
    return await _set_draining(services, request, engine, True)


@router.post("/engines/{engine}/resume")
async def resume(engine: EngineName, request: Request, services: ServicesDep) -> EngineOut:
    """Resume sending requests to a drained engine."""
    return await _set_draining(services, request, engine, False)


async def _set_draining(
    services: Services, request: Request, name: str, draining: bool
) -> EngineOut:
    engine = services.fleet.named(name)
    async with services.database.writing() as session:
        audit.record(
            session, actor_of(request), f"engine.{'drain' if draining else 'resume'}", name, None
        )
    engine.draining = draining
    return _out(engine)


def _out(engine: Engine) -> EngineOut:
    return EngineOut(
        name=engine.name,
        healthy=engine.healthy,
        reason=engine.state.trouble,
        message=engine.state.sentence,
        draining=engine.draining,
        in_flight=engine.in_flight,
    )
