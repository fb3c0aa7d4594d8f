"""Admin routes for the jobs of all tenants, with the reason of a failure."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Path, Query, Request

from reft_serve.database import audit
from reft_serve.database.jobs import fine_tuning
from reft_serve.database.jobs.outcomes import Status
from reft_serve.database.tenants import find_tenant
from reft_serve.gateway.routes.bounded_route import BoundedRoute
from reft_serve.gateway.routes.deps import ServicesDep, actor_of, requires
from reft_serve.gateway.routes.fine_tuning import JOB_ID
from reft_serve.gateway.schemas.fields import TENANT_ID_OR_NAME
from reft_serve.gateway.schemas.fine_tuning import JobAdminOut, Page

__all__ = ["router"]

router = APIRouter(
    prefix="/v1/admin/jobs",
    tags=["admin"],
    dependencies=[Depends(requires("admin"))],
    route_class=BoundedRoute,
)
_Job = Annotated[str, Path(pattern=JOB_ID)]
_Tenant = Annotated[
    str | None,
    Query(pattern=TENANT_ID_OR_NAME, description="Id or name of a tenant; default: all tenants."),
]


@router.get("")
async def list_all(
    services: ServicesDep,
    after: Annotated[str | None, Query(pattern=JOB_ID)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    tenant: _Tenant = None,
    status: Annotated[list[Status] | None, Query(max_length=6)] = None,
) -> Page[JobAdminOut]:
    """List the jobs of all tenants or of one, newest first."""
    async with services.database.reading() as session:
        tenant_id = None if tenant is None else (await find_tenant(session, tenant)).id
        found, more = await fine_tuning.list_jobs(
            session, tenant_id, after=after, limit=limit, statuses=status
        )
    return Page.of([JobAdminOut.of(job) for job in found], more)


@router.get("/{job}")
async def get(job: _Job, services: ServicesDep) -> JobAdminOut:
    """Get a job with its worker and the traceback of its failure."""
    async with services.database.reading() as session:
        return JobAdminOut.of(await fine_tuning.find_job(session, None, job))


@router.post("/{job}/{what}")
async def ask(
    job: _Job, what: Literal["cancel", "pause", "resume"], request: Request, services: ServicesDep
) -> JobAdminOut:
    """Cancel, pause or resume the job of any tenant."""
    async with services.database.writing() as session:
        found = await fine_tuning.ask(session, None, job, what)
        audit.record(session, actor_of(request), f"job.{what}", job, found.tenant_id)
        return JobAdminOut.of(found)
