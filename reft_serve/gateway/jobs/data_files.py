"""A file on its way in and out: request -> checked -> row -> blob -> seen, and back. What fails on
the way leaves nothing.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass

from fastapi import UploadFile
from starlette.types import Receive

from reft_serve.database import audit, files
from reft_serve.database.files import WrittenFile, key_of_blob
from reft_serve.database.keys import Principal
from reft_serve.database.models import File, now_ms
from reft_serve.database.room import check_room, lock_room
from reft_serve.datafiles.formats import check_rows
from reft_serve.datafiles.lines import FileLimits
from reft_serve.errors import RequestTooLarge
from reft_serve.gateway.services import Services
from reft_serve.gateway.uploads.checking import checking_for
from reft_serve.gateway.uploads.subprocess_check import check_in_subprocess

__all__ = ["drop", "opened", "sweep", "take"]

_CHUNK = 1 << 20
# A file of this size is checked in some tens of milliseconds; a process needs longer to begin.
_SMALL = 256 << 10
_UPLOAD_MS = 3_600_000
_CONTROLS = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class _Facts:
    filename: str
    format: str
    rows: int


async def take(
    services: Services,
    caller: Principal,
    actor: audit.Actor,
    upload: UploadFile,
    expires_seconds: int | None,
    receive: Receive,
) -> File:
    """Check a data file and keep it. `receive` is the request's: the check ends when the caller
    leaves.

    Raises:
        DataInvalid: with every fault of it.
        RequestTooLarge: it has more bytes than are taken.
        RateLimited: the tenant has no room for it.
        StoreUnusable: the file store cannot take it.
    """
    facts = await _checked(services, caller.tenant_id, upload, receive)
    seconds = expires_seconds if expires_seconds is not None else services.settings.file_seconds
    expires_ms = None if seconds is None else now_ms() + seconds * 1000
    async with services.database.writing() as session:
        await lock_room(session, caller.tenant_id)
        limits = services.quotas.limits(caller)
        await check_room(session, caller.tenant_id, limits, size=upload.size or 0, files=1)
        file_id = await files.start_file(
            session,
            caller.tenant_id,
            caller.key_id,
            filename=facts.filename,
            purpose="fine-tune",
            expires_ms=expires_ms,
        )
    try:
        return await _written(services, caller, actor, upload, file_id, facts)
    except BaseException:
        services.background.spawn(_discard(services, file_id), caller.tenant_id)
        raise


async def opened(services: Services, file: File) -> AsyncIterator[bytes]:
    """A file's bytes, of which the first have been read.

    Raises:
        StoreUnusable: they cannot be.
    """
    chunks = services.blobs.read(key_of_blob(file.id))
    first = await anext(chunks, b"")

    async def all_of_them() -> AsyncIterator[bytes]:
        yield first
        async for chunk in chunks:
            yield chunk

    return all_of_them()


async def drop(services: Services, file_id: str) -> None:
    """Remove the blob of a hidden file, then its row."""
    await services.blobs.delete(key_of_blob(file_id))
    async with services.database.writing() as session:
        await files.forget_file(session, file_id)


async def sweep(services: Services) -> None:
    """Remove files that were deleted, have expired, or were left half way by a gateway or worker
    that died.
    """
    async with services.database.writing() as session:
        expired = await files.swept_files(session, now_ms() - _UPLOAD_MS)
    for file_id in expired:
        await drop(services, file_id)


async def _checked(
    services: Services, tenant_id: str, upload: UploadFile, receive: Receive
) -> _Facts:
    most = services.settings.max_file_bytes
    if (upload.size or 0) > most:
        raise RequestTooLarge(f"the file has more than the {most:,} bytes allowed here")
    name = (
        _CONTROLS.sub("", (upload.filename or "").replace("\\", "/").rpartition("/")[2])[:255]
        or "file"
    )
    limits = FileLimits(file_bytes=most)
    if (upload.size or 0) <= _SMALL:
        return _Facts(name, *await asyncio.to_thread(check_rows, upload.file, name, limits))
    async with checking_for(services.checking, tenant_id, receive):
        descriptor = upload.file.fileno()
        await upload.seek(0)
        arguments = {"where": name, "limits": asdict(limits)}
        report = await check_in_subprocess("data file", arguments, descriptor, upload.size or 0)
    return _Facts(name, report["format"], report["rows"])


async def _written(
    services: Services,
    caller: Principal,
    actor: audit.Actor,
    upload: UploadFile,
    file_id: str,
    facts: _Facts,
) -> File:
    await upload.seek(0)
    written = await services.blobs.write(
        key_of_blob(file_id), _chunks(upload), services.settings.max_file_bytes
    )
    whole = WrittenFile(file_id, written.size, written.sha256, facts.format, facts.rows)
    async with services.database.writing() as session:
        await lock_room(session, caller.tenant_id)
        await check_room(
            session, caller.tenant_id, services.quotas.limits(caller), size=written.size
        )
        file = await files.complete_file(session, whole)
        audit.record(
            session,
            actor,
            "file.create",
            file.id,
            caller.tenant_id,
            bytes=file.bytes,
            sha256=file.sha256,
            rows=facts.rows,
        )
    return file


async def _discard(services: Services, file_id: str) -> None:
    async with services.database.writing() as session:
        await files.hide_file(session, file_id)
    await drop(services, file_id)


async def _chunks(upload: UploadFile) -> AsyncIterator[bytes]:
    while chunk := await upload.read(_CHUNK):
        yield chunk
