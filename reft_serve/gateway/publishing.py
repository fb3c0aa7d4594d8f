"""A version on its way in and out: files -> store -> engines -> database, and back. What fails on
the way leaves nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

from fastapi import UploadFile
from starlette.types import Receive

from reft_serve.database import adapters, aliases, audit
from reft_serve.database.keys import Principal
from reft_serve.database.models import Version
from reft_serve.database.names import check_adapter_name, check_alias_name
from reft_serve.database.room import check_room, lock_room
from reft_serve.database.tenants import find_tenant
from reft_serve.errors import AdapterInvalid, RateLimited
from reft_serve.gateway.engines.engine import engine_name
from reft_serve.gateway.services import Services
from reft_serve.gateway.uploads.unpacking import CheckedAdapter, Uploaded, stage

__all__ = ["Upload", "publish", "retire"]

_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Upload:
    """An adapter to publish; `receive` is the request's."""

    name: str
    files: list[UploadFile]
    receive: Receive
    alias: str | None = None


async def publish(
    services: Services, caller: Principal, actor: audit.Actor, upload: Upload
) -> Version:
    """Check an upload, in this process and in every engine that is up, and make it the adapter's
    latest version.

    Raises:
        AdapterInvalid: every fault of it.
        RequestInvalid, RequestTooLarge: a name is reserved, or it is not an adapter's files.
        RateLimited: the tenant has no room for it.
        EngineUnavailable: no engine is up to check it.
        StoreUnusable: the store cannot take it.
    """
    _check_names(services, caller, upload)
    with ExitStack() as stack:
        staged = await asyncio.to_thread(lambda: stack.enter_context(services.store.staging()))
        uploaded = Uploaded(upload.name, upload.files, caller.tenant_id, upload.receive)
        checked = await stage(
            uploaded, staged, services.settings.max_upload_bytes, services.checking
        )
        # again in `_record`: this one spares the work
        async with services.database.reading() as session:
            limits = services.quotas.limits(caller)
            await check_room(
                session,
                caller.tenant_id,
                limits,
                size=checked.size,
                adapter=upload.name,
                versions=1,
            )
        digest = await asyncio.to_thread(services.store.publish, staged)
        try:
            await _load(services, upload.name, digest)
            return await _record(services, caller, actor, upload, digest, checked)
        except BaseException:
            services.background.spawn(retire(services, [digest]), caller.tenant_id)
            raise


def _check_names(services: Services, caller: Principal, upload: Upload) -> None:
    """Refuse reserved names before any file of the upload is read."""
    base = services.settings.base_model
    check_adapter_name(upload.name, base, caller.tenant)
    if upload.alias is not None:
        check_alias_name(upload.alias, base, upload.name)


async def _load(services: Services, name: str, digest: str) -> None:
    try:
        await services.fleet.load(engine_name(digest), services.store.path(digest))
    except AdapterInvalid as exc:
        raise AdapterInvalid(name, exc.faults) from exc


async def _record(
    services: Services,
    caller: Principal,
    actor: audit.Actor,
    upload: Upload,
    digest: str,
    checked: CheckedAdapter,
) -> Version:
    async with services.database.writing() as session:
        await lock_room(session, caller.tenant_id)
        await services.database.lock(session, digest)
        limits = services.quotas.limits(caller)
        await check_room(
            session, caller.tenant_id, limits, size=checked.size, adapter=upload.name, versions=1
        )
        if not services.store.path(digest).is_dir():  # its last owner removed it in this moment
            raise RateLimited("the adapter was deleted at the same time; upload it again", 1.0)
        tenant = await find_tenant(session, caller.tenant_id)
        version = await adapters.add_version(
            session,
            tenant,
            upload.name,
            digest=digest,
            base_model=checked.base_model,
            size_bytes=checked.size,
            source="upload",
            facts=checked.facts,
            base_name=services.settings.base_model,
        )
        if upload.alias is not None:
            await aliases.set_alias(
                session,
                version.adapter,
                upload.alias,
                version,
                base_name=services.settings.base_model,
            )
        audit.record(
            session,
            actor,
            "version.create",
            f"{upload.name}@{version.number}",
            tenant.id,
            digest=digest,
            bytes=checked.size,
            alias=upload.alias,
        )
    services.lookup.forget()
    return version


async def retire(services: Services, digests: Iterable[str]) -> None:
    """Remove unused versions from the engines, once no request uses them, and from the store."""
    for digest in digests:
        async with services.database.reading() as session:
            used = await adapters.is_used(session, digest)
        if not used:
            await services.fleet.unload(engine_name(digest), _PATIENCE_SECONDS)
        async with services.database.writing() as session:
            await services.database.lock(session, digest)
            if not await adapters.is_used(session, digest):
                await asyncio.to_thread(services.store.remove, digest)
