"""The caller's adapters: upload, list, download, delete, aliases and shares."""

from __future__ import annotations

import asyncio
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import IO, Annotated

from fastapi import APIRouter, Depends, File, Form, Path, Query, Request, UploadFile
from fastapi.responses import StreamingResponse
from sqlalchemy.ext.asyncio import AsyncSession

from reft_serve.database import adapters, aliases, audit
from reft_serve.database.keys import Principal
from reft_serve.database.models import Adapter
from reft_serve.database.names import ADAPTER_NAME, ALIAS_NAME
from reft_serve.database.tenants import find_tenant
from reft_serve.gateway import publishing
from reft_serve.gateway.routes.bounded_route import BoundedRoute
from reft_serve.gateway.routes.deps import ServicesDep, actor_of, requires
from reft_serve.gateway.schemas.fields import TENANT_ID
from reft_serve.gateway.schemas.tenancy import (
    AdapterOut,
    AliasIn,
    AliasOut,
    Deleted,
    ListOf,
    VersionOut,
)

__all__ = ["ADAPTERS_PER_PAGE", "VERSIONS_SHOWN", "router"]

ADAPTERS_PER_PAGE = 100
VERSIONS_SHOWN = 50
_AFTER = "The last id of the previous page."

router = APIRouter(prefix="/v1/adapters", tags=["adapters"], route_class=BoundedRoute)
_Caller = Annotated[Principal, Depends(requires("adapters"))]
_Name = Annotated[str, Path(pattern=ADAPTER_NAME)]
_Alias = Annotated[str, Path(pattern=ALIAS_NAME)]
_Version = Annotated[
    str,
    Path(
        pattern=r"^([0-9]{1,9}|[a-z][a-z0-9-]{0,30})$", description="A version number or an alias."
    ),
]
_Tenant = Annotated[str, Path(pattern=TENANT_ID, description="Id of the other tenant.")]
_CHUNK = 1 << 20


@router.post("", status_code=201)
async def upload(
    request: Request,
    caller: _Caller,
    services: ServicesDep,
    name: Annotated[str, Form(pattern=ADAPTER_NAME)],
    files: Annotated[
        list[UploadFile],
        File(
            min_length=1,
            description="The adapter's files, or one .tar, .tar.gz, .tar.bz2, .tar.xz or .zip of "
            "them.",
        ),
    ],
    alias: Annotated[
        str | None, Form(pattern=ALIAS_NAME, description="Alias to set to the new version.")
    ] = None,
) -> VersionOut:
    """Publish a new version of an adapter (the first creates it). It is ready to serve when this
    returns.
    """
    wanted = publishing.Upload(name, files, request.receive, alias)
    return VersionOut.of(await publishing.publish(services, caller, actor_of(request), wanted))


@router.get("")
async def list_all(
    caller: _Caller,
    services: ServicesDep,
    after: Annotated[str | None, Query(pattern=r"^adp_[0-9a-f]{24}$", description=_AFTER)] = None,
    limit: Annotated[int, Query(ge=1, le=ADAPTERS_PER_PAGE)] = ADAPTERS_PER_PAGE,
) -> ListOf[AdapterOut]:
    """List the caller's own adapters by name, each with its latest versions."""
    async with services.database.reading() as session:
        mine, more = await adapters.list_adapters(
            session, caller.tenant_id, after=after, limit=limit
        )
        described = await adapters.describe(session, mine, VERSIONS_SHOWN)
    return ListOf(data=[_out(each) for each in described], has_more=more)


@router.get("/{name}")
async def get(name: _Name, caller: _Caller, services: ServicesDep) -> AdapterOut:
    """Get an adapter with its latest versions and its aliases."""
    async with services.database.reading() as session:
        return await _described(
            session, await adapters.find_adapter(session, caller.tenant_id, name)
        )


@router.delete("/{name}")
async def delete(name: _Name, request: Request, caller: _Caller, services: ServicesDep) -> Deleted:
    """Delete an adapter with all its versions. Requests in progress finish."""
    async with services.database.writing() as session:
        adapter = await adapters.find_adapter(session, caller.tenant_id, name)
        digests = await adapters.delete_adapter(session, adapter)
        audit.record(session, actor_of(request), "adapter.delete", name, caller.tenant_id)
    services.lookup.forget()
    services.background.spawn(publishing.retire(services, digests), caller.tenant_id)
    return Deleted(id=name, object="adapter")


@router.get("/{name}/versions")
async def list_versions(
    name: _Name,
    caller: _Caller,
    services: ServicesDep,
    after: Annotated[
        int | None, Query(ge=1, lt=1 << 31, description="The last version of the previous page.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> ListOf[VersionOut]:
    """List the versions of an adapter, newest first."""
    async with services.database.reading() as session:
        adapter = await adapters.find_adapter(session, caller.tenant_id, name)
        rows = await adapters.list_versions(session, adapter.id, before=after, limit=limit + 1)
    return ListOf(
        data=[VersionOut.of(version) for version in rows[:limit]], has_more=len(rows) > limit
    )


@router.get("/{name}/versions/{version}")
async def get_version(
    name: _Name, version: _Version, caller: _Caller, services: ServicesDep
) -> VersionOut:
    """Get one version of an adapter."""
    async with services.database.reading() as session:
        adapter = await adapters.find_adapter(session, caller.tenant_id, name)
        return VersionOut.of(await adapters.find_version(session, adapter, version))


@router.delete("/{name}/versions/{version}")
async def delete_version(
    name: _Name, version: _Version, request: Request, caller: _Caller, services: ServicesDep
) -> Deleted:
    """Delete a version. A version that an alias points to cannot be deleted."""
    async with services.database.writing() as session:
        adapter = await adapters.find_adapter(session, caller.tenant_id, name)
        row = await adapters.find_version(session, adapter, version)
        label = f"{name}@{row.number}"
        digest = await adapters.delete_version(session, row)
        audit.record(
            session, actor_of(request), "version.delete", label, caller.tenant_id, digest=digest
        )
    services.lookup.forget()
    services.background.spawn(publishing.retire(services, [digest]), caller.tenant_id)
    return Deleted(id=label, object="adapter.version")


@router.get(
    "/{name}/versions/{version}/content",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}}}
    },
)
async def download(
    name: _Name, version: _Version, caller: _Caller, services: ServicesDep
) -> StreamingResponse:
    """Download the files of a version as a tar archive, which can be uploaded again."""
    async with services.database.reading() as session:
        adapter = await adapters.find_adapter(session, caller.tenant_id, name)
        row = await adapters.find_version(session, adapter, version)
    files = await asyncio.to_thread(services.store.files, row.digest)
    packed = await asyncio.to_thread(_packed, files)
    headers = {"content-disposition": f'attachment; filename="{name}-{row.number}.tar"'}
    return StreamingResponse(_chunks(packed), media_type="application/x-tar", headers=headers)


@router.put("/{name}/aliases/{alias}")
async def put_alias(
    name: _Name,
    alias: _Alias,
    body: AliasIn,
    request: Request,
    caller: _Caller,
    services: ServicesDep,
) -> AliasOut:
    """Point an alias at a version. Requests for the bare name go to `production`; other aliases may
    take a share of them.
    """
    async with services.database.writing() as session:
        adapter = await adapters.find_adapter(session, caller.tenant_id, name)
        version = await adapters.find_version(session, adapter, body.version)
        changed = await aliases.set_alias(
            session, adapter, alias, version, body.share, base_name=services.settings.base_model
        )
        audit.record(
            session,
            actor_of(request),
            "alias.set",
            f"{name}@{alias}",
            caller.tenant_id,
            version=version.number,
            share=changed.share,
        )
    services.lookup.forget()
    return AliasOut.of(changed)


@router.post("/{name}/aliases/{alias}/rollback")
async def roll_back(
    name: _Name, alias: _Alias, request: Request, caller: _Caller, services: ServicesDep
) -> AliasOut:
    """Undo the last change of an alias: point it at its previous version."""
    async with services.database.writing() as session:
        adapter = await adapters.find_adapter(session, caller.tenant_id, name)
        changed = await aliases.roll_back(session, adapter, alias)
        label = f"{name}@{alias}"
        number = changed.version.number
        audit.record(
            session, actor_of(request), "alias.rollback", label, caller.tenant_id, version=number
        )
    services.lookup.forget()
    return AliasOut.of(changed)


@router.delete("/{name}/aliases/{alias}")
async def delete_alias(
    name: _Name, alias: _Alias, request: Request, caller: _Caller, services: ServicesDep
) -> Deleted:
    """Delete an alias; its version is kept."""
    async with services.database.writing() as session:
        adapter = await adapters.find_adapter(session, caller.tenant_id, name)
        await aliases.delete_alias(session, adapter, alias)
        audit.record(
            session, actor_of(request), "alias.delete", f"{name}@{alias}", caller.tenant_id
        )
    services.lookup.forget()
    return Deleted(id=f"{name}@{alias}", object="adapter.alias")


@router.put("/{name}/shares/{tenant}")
async def put_share(
    name: _Name, tenant: _Tenant, request: Request, caller: _Caller, services: ServicesDep
) -> AdapterOut:
    """Share an adapter with another tenant, which calls it as `yourname/adapter`."""
    async with services.database.writing() as session:
        adapter = await adapters.find_adapter(session, caller.tenant_id, name)
        other = await find_tenant(session, tenant)
        await adapters.share(session, adapter, other)
        audit.record(
            session, actor_of(request), "adapter.share", name, caller.tenant_id, tenant=other.id
        )
        described = await _described(session, adapter)
    services.lookup.forget()
    return described


@router.delete("/{name}/shares/{tenant}")
async def delete_share(
    name: _Name, tenant: _Tenant, request: Request, caller: _Caller, services: ServicesDep
) -> Deleted:
    """Stop sharing the adapter with this tenant."""
    async with services.database.writing() as session:
        adapter = await adapters.find_adapter(session, caller.tenant_id, name)
        other = await find_tenant(session, tenant)
        await adapters.unshare(session, adapter, other)
        audit.record(
            session, actor_of(request), "adapter.unshare", name, caller.tenant_id, tenant=other.id
        )
    services.lookup.forget()
    return Deleted(id=f"{name}:{tenant}", object="adapter.share")


async def _described(session: AsyncSession, adapter: Adapter) -> AdapterOut:
    return _out((await adapters.describe(session, [adapter], VERSIONS_SHOWN))[0])


def _out(described: adapters.Description) -> AdapterOut:
    adapter = described.adapter
    return AdapterOut(
        id=adapter.id,
        name=adapter.name,
        created_at=adapter.created_ms // 1000,
        versions=[VersionOut.of(version) for version in described.versions],
        aliases=[AliasOut.of(alias) for alias in described.aliases],
        shared_with=described.shared_with,
    )


def _packed(files: list[FilePath]) -> IO[bytes]:
    packed = tempfile.SpooledTemporaryFile(max_size=8 << 20)  # noqa: SIM115 - closed once sent
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for file in files:
            facts = tarfile.TarInfo(file.name)
            facts.size = file.stat().st_size
            with file.open("rb") as opened:
                archive.addfile(facts, opened)
    packed.seek(0)
    return packed


def _chunks(packed: IO[bytes]) -> Iterator[bytes]:
    with packed:
        while chunk := packed.read(_CHUNK):
            yield chunk
