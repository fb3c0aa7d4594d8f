"""OpenAI's files API for fine-tuning data: upload with checks, list, read, delete."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, File, Form, Path, Query, Request, UploadFile
from fastapi.responses import StreamingResponse
from pydantic import BeforeValidator

from reft_serve.database import audit, files
from reft_serve.database.keys import Principal
from reft_serve.errors import RequestInvalid
from reft_serve.gateway.jobs import data_files
from reft_serve.gateway.routes.bounded_route import BoundedRoute
from reft_serve.gateway.routes.deps import ServicesDep, actor_of, requires
from reft_serve.gateway.schemas.fine_tuning import FILE_ID, FileOut, Page
from reft_serve.gateway.schemas.tenancy import Deleted

__all__ = ["router"]


class _FileRoute(BoundedRoute):
    upload_setting = "max_file_bytes"


router = APIRouter(prefix="/v1/files", tags=["files"], route_class=_FileRoute)
_Caller = Annotated[Principal, Depends(requires("files"))]
_File = Annotated[str, Path(pattern=FILE_ID)]


def _known_purpose(purpose: object) -> object:
    if purpose != "fine-tune":
        raise ValueError(f"only the purpose fine-tune is supported, not {str(purpose)[:40]!r}")
    return purpose


@router.post("")
async def upload(
    request: Request,
    caller: _Caller,
    services: ServicesDep,
    file: Annotated[
        UploadFile,
        File(description="JSONL of chats, of prompts and completions, or of preferences."),
    ],
    purpose: Annotated[Literal["fine-tune"], BeforeValidator(_known_purpose), Form()],
    anchor: Annotated[Literal["created_at"] | None, Form(alias="expires_after[anchor]")] = None,
    seconds: Annotated[
        int | None, Form(alias="expires_after[seconds]", ge=3600, le=2_592_000)
    ] = None,
) -> FileOut:
    """Upload a data file. Every row is checked; an invalid file is rejected with the line numbers
    of its faults.
    """
    if (anchor is None) != (seconds is None):
        raise RequestInvalid(
            "an expiry needs both expires_after[anchor]=created_at and expires_after[seconds]",
            "expires_after",
        )
    return FileOut.of(
        await data_files.take(services, caller, actor_of(request), file, seconds, request.receive)
    )


@router.get("")
async def list_all(
    caller: _Caller,
    services: ServicesDep,
    after: Annotated[
        str | None, Query(pattern=FILE_ID, description="The last id of the previous page.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=32, pattern=r"^[a-z_-]+$")] = None,
) -> Page[FileOut]:
    """List the tenant's files by creation time."""
    async with services.database.reading() as session:
        rows, more = await files.list_files(
            session,
            caller.tenant_id,
            after=after,
            limit=limit,
            ascending=order == "asc",
            purpose=purpose,
        )
    return Page.of([FileOut.of(file) for file in rows], more)


@router.get("/{file}")
async def get(file: _File, caller: _Caller, services: ServicesDep) -> FileOut:
    """Get the metadata of a file."""
    async with services.database.reading() as session:
        return FileOut.of(await files.find_file(session, caller.tenant_id, file))


@router.get(
    "/{file}/content",
    response_class=StreamingResponse,
    responses={
        200: {
            "content": {
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}
            }
        }
    },
)
async def content(file: _File, caller: _Caller, services: ServicesDep) -> StreamingResponse:
    """Download a file: a data file as uploaded, or the metrics of a job as CSV."""
    async with services.database.reading() as session:
        row = await files.find_file(session, caller.tenant_id, file)
    ending = "csv" if row.purpose == "fine-tune-results" else "jsonl"
    headers = {
        "content-disposition": f'attachment; filename="{row.id}.{ending}"',
        "content-length": str(row.bytes),
        "x-content-type-options": "nosniff",
    }
    chunks = await data_files.opened(services, row)
    return StreamingResponse(chunks, media_type="application/octet-stream", headers=headers)


@router.delete("/{file}")
async def delete(file: _File, request: Request, caller: _Caller, services: ServicesDep) -> Deleted:
    """Delete a file. A file that an unfinished job uses cannot be deleted."""
    async with services.database.writing() as session:
        gone = await files.delete_file(session, caller.tenant_id, file)
        audit.record(
            session, actor_of(request), "file.delete", gone.id, caller.tenant_id, bytes=gone.bytes
        )
    services.background.spawn(data_files.drop(services, gone.id), caller.tenant_id)
    return Deleted(id=gone.id, object="file")
