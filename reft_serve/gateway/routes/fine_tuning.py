"""OpenAI's fine-tuning jobs: create, list, follow, cancel, pause, resume."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request, Response

from reft_serve.database import audit
from reft_serve.database.jobs import fine_tuning
from reft_serve.database.keys import Principal
from reft_serve.errors import RequestInvalid
from reft_serve.gateway.jobs import submit
from reft_serve.gateway.routes.bounded_route import BoundedRoute
from reft_serve.gateway.routes.deps import ServicesDep, actor_of, requires
from reft_serve.gateway.schemas.fine_tuning import CheckpointOut, EventOut, JobIn, JobOut, Page
from reft_serve.gateway.services import Services

__all__ = ["JOB_ID", "router"]

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"], route_class=BoundedRoute)
JOB_ID = r"^ftjob-[A-Za-z0-9]{1,57}$"
_Caller = Annotated[Principal, Depends(requires("jobs"))]
_Job = Annotated[str, Path(pattern=JOB_ID)]
_Limit = Annotated[int, Query(ge=1, le=1000)]
_AfterEvent = Annotated[str | None, Query(pattern=r"^ftevent-[A-Za-z0-9]{1,55}$")]
_METADATA = re.compile(r"metadata\[(.*)\]", re.DOTALL)
_FILTER: dict[str, Any] = {
    "name": "metadata",
    "in": "query",
    "style": "deepObject",
    "explode": True,
    # All values arrive as strings.
    "schema": {"type": "object"},
    "description": "Only jobs with this metadata, as metadata[key]=value; metadata=null for jobs "
    "without metadata.",
}


@router.post("")
async def create(body: JobIn, request: Request, caller: _Caller, services: ServicesDep) -> JobOut:
    """Create a fine-tuning job and queue it."""
    return JobOut.of(await submit.submit(services, caller, actor_of(request), body))


@router.get("", openapi_extra={"parameters": [_FILTER]})
async def list_all(
    request: Request,
    caller: _Caller,
    services: ServicesDep,
    after: Annotated[
        str | None, Query(pattern=JOB_ID, description="The last id of the previous page.")
    ] = None,
    limit: _Limit = 20,
) -> Page[JobOut]:
    """List the tenant's jobs, newest first."""
    wanted = _metadata(request)
    if wanted and any("\0" in text for pair in wanted.items() for text in pair):
        return Page.of([], False)  # no metadata holds one, and PostgreSQL has no such text
    async with services.database.reading() as session:
        rows, more = await fine_tuning.list_jobs(
            session, caller.tenant_id, after=after, limit=limit, metadata=wanted
        )
    return Page.of([JobOut.of(job) for job in rows], more)


@router.get("/{job}")
async def get(job: _Job, caller: _Caller, services: ServicesDep) -> JobOut:
    """Get one job."""
    async with services.database.reading() as session:
        return JobOut.of(await fine_tuning.find_job(session, caller.tenant_id, job))


@router.post("/{job}/cancel")
async def cancel(job: _Job, request: Request, caller: _Caller, services: ServicesDep) -> JobOut:
    """Cancel a job: at once if it is queued, after the current step if it is running."""
    return await _change(job, "cancel", request, caller, services)


@router.post("/{job}/pause")
async def pause(job: _Job, request: Request, caller: _Caller, services: ServicesDep) -> JobOut:
    """Pause a job until it is resumed: at once if it is queued, after the current step if it is
    running.
    """
    return await _change(job, "pause", request, caller, services)


@router.post("/{job}/resume")
async def resume(job: _Job, request: Request, caller: _Caller, services: ServicesDep) -> JobOut:
    """Queue a paused job again; it continues from its last checkpoint."""
    return await _change(job, "resume", request, caller, services)


@router.get("/{job}/events", responses={200: {"content": {"text/event-stream": {"schema": {}}}}})
async def events(
    job: _Job,
    caller: _Caller,
    services: ServicesDep,
    after: _AfterEvent = None,
    limit: _Limit = 20,
    stream: Annotated[
        bool,
        Query(
            description="Stream the events as server-sent events, oldest first, until the job ends."
        ),
    ] = False,
) -> Page[EventOut]:
    """List the events of a job, newest first; with `stream`, follow them as they happen, oldest
    first.
    """
    async with services.database.reading() as session:
        row = await fine_tuning.find_job(session, caller.tenant_id, job)
        if not stream:
            page, more = await fine_tuning.list_events(session, row.id, after=after, limit=limit)
            return Page.of([EventOut.of(event) for event in page], more)
    answer: Response = await services.followers.follow(caller, row.id, after)
    return answer  # type: ignore[return-value]


@router.get("/{job}/checkpoints")
async def checkpoints(
    job: _Job,
    caller: _Caller,
    services: ServicesDep,
    after: Annotated[str | None, Query(pattern=r"^ftckpt-[A-Za-z0-9]{1,56}$")] = None,
    limit: _Limit = 10,
) -> Page[CheckpointOut]:
    """List a job's checkpoints, newest first. They can be used as models once the job has
    succeeded.
    """
    async with services.database.reading() as session:
        row = await fine_tuning.find_job(session, caller.tenant_id, job)
        page, more = await fine_tuning.list_checkpoints(session, row.id, after=after, limit=limit)
    return Page.of([CheckpointOut.of(checkpoint) for checkpoint in page], more)


async def _change(
    job: str,
    what: Literal["cancel", "pause", "resume"],
    request: Request,
    caller: Principal,
    services: Services,
) -> JobOut:
    async with services.database.writing() as session:
        changed = await fine_tuning.request_change(session, caller.tenant_id, job, what)
        audit.record(session, actor_of(request), f"job.{what}", job, caller.tenant_id)
        return JobOut.of(changed)


def _metadata(request: Request) -> dict[str, str] | None:
    """The metadata filter in either of OpenAI's two spellings; None without one."""
    matches = [(_METADATA.fullmatch(name), value) for name, value in request.query_params.items()]
    bracketed = {match[1]: value for match, value in matches if match}
    plain = request.query_params.get("metadata")
    if plain not in (None, "null"):
        raise RequestInvalid(
            "write metadata[KEY]=VALUE, or metadata=null for jobs without metadata", "metadata"
        )
    return bracketed or (None if plain is None else {})
