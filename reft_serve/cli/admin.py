"""`reft-serve admin`: administer the gateway's database, with or without a running gateway."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

    from reft_serve.backup import Stores
    from reft_serve.database.connection import Database

__all__ = ["app"]

_T = TypeVar("_T")
app = typer.Typer(
    no_args_is_help=True,
    help="Manage tenants, keys, usage and backups in the database that REFT_DATABASE names.",
)
tenant = typer.Typer(no_args_is_help=True, help="Create, list, limit, disable and enable tenants.")
key = typer.Typer(no_args_is_help=True, help="Create, list, rotate and revoke API keys.")
app.add_typer(tenant, name="tenant")
app.add_typer(key, name="key")

_Name = Annotated[str, typer.Argument(metavar="TENANT", help="A tenant's name or id.")]
_Limits = Annotated[
    str,
    typer.Option(
        "--limits",
        metavar="JSON",
        help='For instance {"requests_per_minute": 60}; {} for the defaults.',
    ),
]


@app.command()
def migrate() -> None:
    """Migrate the database to this version's schema."""

    async def migrated() -> None:
        from reft_serve.database.migrations.schema import migrate

        async with _opened() as database:
            await migrate(database)

    asyncio.run(migrated())
    typer.echo("the database is up to date")


@app.command()
def backup(folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")]) -> None:
    """Write a consistent backup of the database, all adapter versions and all files to FOLDER while
    gateways run.
    """
    from reft_serve.backup import back_up

    saved = asyncio.run(_with_stores(lambda stores: back_up(stores, folder)))
    typer.echo(
        f"{saved.rows} rows, {len(saved.versions)} versions and {len(saved.blobs)} files written "
        f"to {folder}"
    )


@app.command()
def restore(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder written by `backup`.")],
) -> None:
    """Restore a backup into an empty database and the stores. SQLite and PostgreSQL backups are
    interchangeable.
    """
    from reft_serve.backup import bring_back

    restored = asyncio.run(_with_stores(lambda stores: bring_back(stores, folder)))
    typer.echo(
        f"{restored.rows} rows, {len(restored.versions)} versions and {len(restored.blobs)} files "
        "restored"
    )


@tenant.command("create")
def create_tenant(name: _Name, limits: _Limits = "{}") -> None:
    """Create a tenant and print its id."""

    async def create(session: AsyncSession) -> str:
        from reft_serve.database import audit, tenants

        tenant = await tenants.create_tenant(session, name, _limits(limits))
        audit.record(session, audit.Actor(), "tenant.create", name, tenant.id)
        return tenant.id

    typer.echo(_do(create))


@tenant.command("list")
def list_tenants() -> None:
    """List all tenants: name, id, state, limits."""

    async def listed(session: AsyncSession) -> list[str]:
        from reft_serve.database import tenants

        rows = await tenants.list_tenants(session)
        return [
            "\t".join(
                (
                    each.name,
                    each.id,
                    "disabled" if each.disabled_ms else "enabled",
                    json.dumps(each.limits),
                )
            )
            for each in rows
        ]

    for line in _do(listed):
        typer.echo(line)


@tenant.command("limit")
def limit_tenant(name: _Name, limits: _Limits) -> None:
    """Replace a tenant's limits."""
    _change(name, "limits", lambda found: setattr(found, "limits", _limits(limits)))


@tenant.command("disable")
def disable_tenant(name: _Name) -> None:
    """Disable a tenant: its keys are rejected, and nothing is deleted."""
    from reft_serve.database.models import now_ms

    _change(name, "disable", lambda found: setattr(found, "disabled_ms", now_ms()))


@tenant.command("enable")
def enable_tenant(name: _Name) -> None:
    """Enable a disabled tenant."""
    _change(name, "enable", lambda found: setattr(found, "disabled_ms", None))


@key.command("create")
def create_key(
    name: _Name,
    role: Annotated[str, typer.Option(help="admin, owner, inference or metrics.")] = "owner",
    label: Annotated[str, typer.Option(help="Name of the key.")] = "",
    days: Annotated[int | None, typer.Option(min=1, help="Days until it expires.")] = None,
    scopes: Annotated[
        str | None, typer.Option(metavar="A,B", help="Some of the role's scopes; default: all.")
    ] = None,
    limits: _Limits = "{}",
) -> None:
    """Create a key and print its secret, which is shown only once."""

    async def create(session: AsyncSession) -> str:
        from reft_serve.database import audit, keys, tenants
        from reft_serve.database.models import DAY_MS, now_ms
        from reft_serve.errors import RequestInvalid

        if role not in keys.ROLES:
            raise RequestInvalid(f"--role {role[:40]!r} is not one of {', '.join(keys.ROLES)}")
        tenant = await tenants.find_tenant(session, name)
        expires = None if days is None else now_ms() + days * DAY_MS
        chosen = None if scopes is None else [scope.strip() for scope in scopes.split(",")]
        key, secret = await keys.create_key(
            session,
            tenant,
            role,  # type: ignore[arg-type]
            label,
            chosen,
            expires,
            _limits(limits),
        )
        audit.record(session, audit.Actor(), "key.create", key.id, tenant.id, role=role, name=label)
        return secret

    typer.echo(_do(create))


@key.command("list")
def list_keys(name: _Name) -> None:
    """List a tenant's keys: id, prefix, role, state, name."""

    async def listed(session: AsyncSession) -> list[str]:
        from reft_serve.database import keys, tenants

        rows = await keys.list_keys(session, (await tenants.find_tenant(session, name)).id)
        state = {each.id: "revoked" if each.revoked_ms else "valid" for each in rows}
        return [
            f"{each.id}\t{each.prefix}...\t{each.role}\t{state[each.id]}\t{each.name}"
            for each in rows
        ]

    for line in _do(listed):
        typer.echo(line)


@key.command("rotate")
def rotate_key(
    name: _Name,
    key_id: Annotated[str, typer.Argument(metavar="KEY", help="The key's id.")],
    overlap: Annotated[int, typer.Option(min=0, help="Seconds that the old key stays valid.")] = 0,
) -> None:
    """Replace a key and print the new secret, which is shown only once."""

    async def rotate(session: AsyncSession) -> str:
        from reft_serve.database import audit, keys, tenants

        tenant = await tenants.find_tenant(session, name)
        new, secret = await keys.rotate_key(
            session, await keys.find_key(session, tenant.id, key_id), overlap
        )
        audit.record(session, audit.Actor(), "key.rotate", key_id, tenant.id, new=new.id)
        return secret

    typer.echo(_do(rotate))


@key.command("revoke")
def revoke_key(
    name: _Name, key_id: Annotated[str, typer.Argument(metavar="KEY", help="The key's id.")]
) -> None:
    """Revoke a key; running gateways reject it within REFT_CACHE_SECONDS."""

    async def revoke(session: AsyncSession) -> None:
        from reft_serve.database import audit, keys, tenants

        tenant = await tenants.find_tenant(session, name)
        keys.revoke_key(await keys.find_key(session, tenant.id, key_id))
        audit.record(session, audit.Actor(), "key.revoke", key_id, tenant.id)

    _do(revoke)


@app.command()
def usage(
    days: Annotated[int, typer.Option(min=1, help="Length of the period that ends now.")] = 30,
    bucket: Annotated[str, typer.Option(help="day or hour.")] = "day",
) -> None:
    """Print requests and tokens of every tenant as tab-separated lines."""

    async def summed(session: AsyncSession) -> list[str]:
        from reft_serve.database import usage as ledger
        from reft_serve.database.models import now_ms
        from reft_serve.errors import RequestInvalid

        if bucket not in ledger.BUCKETS:
            raise RequestInvalid(
                f"--bucket {bucket[:40]!r} is not one of {', '.join(ledger.BUCKETS)}"
            )
        end = now_ms() + 1
        start = end - days * ledger.BUCKETS["day"]
        rows = await ledger.totals(
            session,
            tenant_id=None,
            start_ms=start,
            end_ms=end,
            bucket=bucket,
            group_by=["tenant", "model"],
        )
        return [
            f"{(t.start_ms or 0) // 1000}\t{t.group['tenant']}\t{t.group['model']}\t"
            f"{t.requests}\t{t.prompt_tokens}\t{t.cached_tokens}\t{t.completion_tokens}"
            for t in rows
        ]

    typer.echo("start\ttenant\tmodel\trequests\tprompt_tokens\tcached_tokens\tcompletion_tokens")
    for line in _do(summed):
        typer.echo(line)


def _limits(text: str) -> dict[str, Any]:
    from pydantic import ValidationError

    from reft_serve.config import TenantLimits
    from reft_serve.errors import RequestInvalid

    try:
        return TenantLimits.model_validate_json(text).model_dump(exclude_none=True)
    except ValidationError as exc:
        wrong = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in exc.errors()
        )
        raise RequestInvalid(f"invalid --limits: {wrong}") from exc


def _change(name: str, what: str, change: Callable[[Any], None]) -> None:
    async def changed(session: AsyncSession) -> None:
        from reft_serve.database import audit, tenants

        tenant = await tenants.find_tenant(session, name)
        change(tenant)
        audit.record(session, audit.Actor(), f"tenant.{what}", tenant.name, tenant.id)

    _do(changed)


def _do(work: Callable[[AsyncSession], Awaitable[_T]]) -> _T:
    """Run `work` in one transaction, after a migration unless REFT_MIGRATE is false."""

    async def done() -> _T:
        from reft_serve.config import GatewaySettings, read_settings
        from reft_serve.database.migrations.schema import check_schema, migrate

        async with _opened() as database:
            await (migrate if read_settings(GatewaySettings).migrate else check_schema)(database)
            async with database.writing() as session:
                return await work(session)

    return asyncio.run(done())


async def _with_stores(work: Callable[[Stores], Awaitable[_T]]) -> _T:
    """Run `work` with the database and stores that the environment names."""
    from reft_serve.adapters.store import AdapterStore
    from reft_serve.backup import Stores
    from reft_serve.config import GatewaySettings, read_settings
    from reft_serve.storage.blobs import BlobStore

    settings = read_settings(GatewaySettings)
    async with _opened() as database:
        return await work(
            Stores(database, AdapterStore(settings.store), BlobStore(settings.blobs_url))
        )


@asynccontextmanager
async def _opened() -> AsyncIterator[Database]:
    from reft_serve.config import GatewaySettings, read_settings
    from reft_serve.database.connection import Database

    database = Database(read_settings(GatewaySettings).database)
    try:
        yield database
    finally:
        await database.close()
