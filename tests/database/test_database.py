"""Rows as every process sees them: the same promises on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from reft_serve.database import adapters, aliases, audit, keys, resolution, tenants, usage
from reft_serve.database.connection import Database
from reft_serve.database.migrations.schema import check_schema, migrate
from reft_serve.database.models import Base, Job, Key, Tenant, Usage, Version, now_ms
from reft_serve.errors import Conflict, DatabaseUnusable, NotAllowed, NotFound, RequestInvalid

pytestmark = pytest.mark.anyio


async def make_tenant(database: Database, name: str) -> Tenant:
    async with database.writing() as session:
        return await tenants.create_tenant(session, name)


async def make_version(
    database: Database, tenant: Tenant, name: str = "birds", digest: str = "d" * 64
) -> Version:
    async with database.writing() as session:
        return await adapters.add_version(
            session, tenant, name, digest=digest, base_model="tiny", size_bytes=10, source="upload"
        )


async def labels(database: Database, tenant: Tenant, model: str) -> list[str] | None:
    async with database.reading() as session:
        route = await resolution.resolve(session, tenant.id, model)
    return None if route is None else [target.label for _, target in route.shares]


def opening(
    request_id: str, tenant: str = "t", started_ms: int | None = None, gateway: str = "g"
) -> usage.Opening:
    return usage.Opening(
        request_id, gateway, tenant, "k", "chat", "birds", "v", started_ms or now_ms()
    )


def ending(begun: usage.Opening, tokens: int = 7) -> usage.Ending:
    return usage.Ending(begun, "completed", 5, 2, tokens, begun.started_ms + 40)


async def test_the_migrations_make_exactly_the_tables_of_the_models(database: Database) -> None:
    def differences(connection: Connection) -> list[object]:
        return compare_metadata(MigrationContext.configure(connection), Base.metadata)

    async with database.engine.connect() as connection:
        assert await connection.run_sync(differences) == []


async def test_to_migrate_again_or_from_many_processes_at_once_changes_nothing(
    database_url: str,
) -> None:
    opened = [Database(database_url) for _ in range(4)]
    await asyncio.gather(*(migrate(each) for each in opened))
    await migrate(opened[0])
    await make_tenant(opened[0], "acme")
    for each in opened:
        await each.close()


async def test_a_job_of_an_earlier_schema_is_kept_and_has_no_parent(database_url: str) -> None:
    opened = Database(database_url)
    await migrate(opened, "0002")
    tenant = await make_tenant(opened, "acme")
    job = {"id": "ftjob-1", "tenant_id": tenant.id, "model": "base", "adapter": "birds"}
    async with opened.writing() as session:
        await session.execute(insert(Job).values(job | {"training_file_id": "file-1", "seed": 7}))
    await migrate(opened)
    async with opened.reading() as session:
        found = await session.get_one(Job, "ftjob-1")
    assert (found.model, found.parent_model, found.parent_digest) == ("base", None, None)
    await opened.close()


async def test_a_schema_of_a_later_version_is_refused(database: Database) -> None:
    async with database.writing() as session:
        await session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(DatabaseUnusable, match="schema 9999"):
        await migrate(database)


@pytest.mark.parametrize("url", ["mysql://x/y", "nonsense", "sqlite://", "sqlite:///:memory:"])
async def test_other_databases_are_refused_with_a_sentence(url: str) -> None:
    with pytest.raises(DatabaseUnusable, match="sqlite:///PATH"):
        Database(url)


async def test_a_server_that_is_not_there_gets_a_sentence_without_the_password() -> None:
    absent = Database("postgresql://user:hidden-word@127.0.0.1:1/none")
    with pytest.raises(DatabaseUnusable) as caught:
        await absent.ping()
    assert "hidden-word" not in str(caught.value)


@pytest.mark.parametrize("table", ["usage", "audit"])
@pytest.mark.parametrize("change", ["UPDATE {} SET key_id = 'x'", "DELETE FROM {}"])
async def test_ledgers_refuse_to_be_changed(database: Database, table: str, change: str) -> None:
    async with database.writing() as session:
        audit.record(session, audit.Actor(), "tenant.create", "acme", None)
    await database.commit(partial(usage.settle, endings=[ending(opening("r1"))]))
    with pytest.raises(DBAPIError, match="append-only"):
        async with database.writing() as session:
            await session.execute(text(change.format(table)))


async def test_what_is_read_over_a_connection_that_is_cut_is_asked_once_more(
    database: Database,
) -> None:
    calls = []

    async def query(session: AsyncSession) -> object:
        calls.append(len(calls))
        if calls == [0] and not database.is_sqlite:  # SQLite has no connection that could be cut
            await session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
        return await session.scalar(text("SELECT 7"))

    async def wrong(session: AsyncSession) -> None:
        calls.append(len(calls))
        await session.execute(text("SELECT nothing FROM nowhere"))

    assert await database.read(query) == 7
    assert len(calls) == (1 if database.is_sqlite else 2)
    calls.clear()
    with pytest.raises(DBAPIError):
        await database.read(wrong)
    assert calls == [0]


async def test_an_exception_takes_every_change_of_its_transaction_back(database: Database) -> None:
    async def twice() -> None:
        async with database.writing() as session:
            await tenants.create_tenant(session, "acme")
            await tenants.create_tenant(session, "acme")

    with pytest.raises(Conflict):
        await twice()
    async with database.reading() as session:
        assert list(await tenants.list_tenants(session)) == []


async def test_a_key_is_recognised_by_its_secret_and_the_database_does_not_hold_it(
    database: Database,
) -> None:
    tenant = await make_tenant(database, "acme")
    async with database.writing() as session:
        key, secret = await keys.create_key(session, tenant, "owner", scopes=["inference", "usage"])
    async with database.reading() as session:
        held = await keys.authenticate(session, keys.digest_of_secret(secret))
        assert held is not None
        assert (held.tenant, held.key_id, held.scopes) == ("acme", key.id, {"inference", "usage"})
        assert await keys.authenticate(session, keys.digest_of_secret(secret + "x")) is None
        row = await session.scalar(select(Key))
        assert row is not None
        assert secret not in repr([getattr(row, column.name) for column in Key.__table__.columns])
        assert secret.startswith(row.prefix)
        assert len(row.prefix) < 12 < len(secret)


async def test_a_key_ends_when_it_is_revoked_expires_or_its_tenant_is_disabled(
    database: Database,
) -> None:
    tenant = await make_tenant(database, "acme")
    async with database.writing() as session:
        secrets_ = [(await keys.create_key(session, tenant, "owner"))[1] for _ in range(3)]
        first, second, third = await keys.list_keys(session, tenant.id)
        keys.revoke_key(first)
        keys.revoke_key(second, now_ms() - 1)
        assert third.revoked_ms is None

    async def alive() -> int:
        async with database.reading() as session:
            found = [
                await keys.authenticate(session, keys.digest_of_secret(secret))
                for secret in secrets_
            ]
        return sum(principal is not None for principal in found)

    assert await alive() == 1
    async with database.writing() as session:
        (await tenants.find_tenant(session, "acme")).disabled_ms = now_ms()
    assert await alive() == 0


async def test_a_key_cannot_have_more_scopes_than_its_role(database: Database) -> None:
    tenant = await make_tenant(database, "acme")
    with pytest.raises(NotAllowed, match="admin"):
        async with database.writing() as session:
            await keys.create_key(session, tenant, "owner", scopes=["admin"])


async def test_versions_are_numbered_and_the_numbers_are_not_used_again(database: Database) -> None:
    tenant = await make_tenant(database, "acme")
    made = await asyncio.gather(*(make_version(database, tenant) for _ in range(5)))
    assert sorted(version.number for version in made) == [1, 2, 3, 4, 5]
    async with database.writing() as session:
        adapter = await adapters.find_adapter(session, tenant.id, "birds")
        await adapters.delete_version(session, await adapters.find_version(session, adapter, "5"))
    assert (await make_version(database, tenant)).number == 6


async def test_names_stand_for_versions(database: Database) -> None:
    tenant = await make_tenant(database, "acme")
    first, second, third = [await make_version(database, tenant) for _ in range(3)]
    assert await labels(database, tenant, "birds") == ["birds@3"]
    async with database.writing() as session:
        adapter = await adapters.find_adapter(session, tenant.id, "birds")
        await aliases.set_alias(session, adapter, "production", second)
        await aliases.set_alias(session, adapter, "canary", third, 0.25)
    assert await labels(database, tenant, "birds") == ["birds@3", "birds@2"]
    assert await labels(database, tenant, "birds@canary") == ["birds@3"]
    assert await labels(database, tenant, "birds@1") == ["birds@1"]
    assert await labels(database, tenant, "acme/birds@1") == ["birds@1"]
    assert await labels(database, tenant, first.model_id) == ["birds@1"]
    for absent in (
        "birds@4",
        "birds@",
        "birds@beta",
        "bird",
        "other/birds",
        "ft:no",
        "",
        "@",
        "/",
        "birds@1@2",
        "birds@²",
    ):
        assert await labels(database, tenant, absent) is None, absent


async def test_a_canary_takes_its_share_and_production_the_rest(database: Database) -> None:
    a, b = resolution.Target("a", "", "a@1"), resolution.Target("b", "", "a@2")
    route = resolution.Route(((0.25, b), (1.0, a)))
    drawn = [route.draw(point / 100) for point in range(100)]
    assert drawn.count(b) == 25


async def test_an_alias_goes_back_to_what_it_named_before(database: Database) -> None:
    tenant = await make_tenant(database, "acme")
    first, second = [await make_version(database, tenant) for _ in range(2)]
    async with database.writing() as session:
        adapter = await adapters.find_adapter(session, tenant.id, "birds")
        for version in (first, second):
            await aliases.set_alias(session, adapter, "production", version)
        assert (await aliases.roll_back(session, adapter, "production")).version.number == 1
        with pytest.raises(Conflict):
            await aliases.roll_back(session, adapter, "production")
        with pytest.raises(NotFound):
            await aliases.roll_back(session, adapter, "canary")
        with pytest.raises(Conflict, match="production"):
            await adapters.delete_version(
                session, await adapters.find_version(session, adapter, "1")
            )


async def test_shares_of_aliases_add_up_to_one_at_most(database: Database) -> None:
    tenant = await make_tenant(database, "acme")
    version = await make_version(database, tenant)
    async with database.writing() as session:
        adapter = await adapters.find_adapter(session, tenant.id, "birds")
        await aliases.set_alias(session, adapter, "canary", version, 0.6)
    async with database.reading() as session:
        with pytest.raises(RequestInvalid, match="add up"):
            await aliases.set_alias(session, adapter, "beta", version, 0.6)


async def test_another_tenants_adapter_is_not_there_unless_it_is_shared(database: Database) -> None:
    owner, guest, third = [
        await make_tenant(database, name) for name in ("owner", "guest", "third")
    ]
    version = await make_version(database, owner)
    names = ("owner/birds", "owner/birds@1", version.model_id)
    for name in (*names, "birds"):
        assert await labels(database, guest, name) is None
    async with database.writing() as session:
        adapter = await adapters.find_adapter(session, owner.id, "birds")
        await adapters.share(session, adapter, guest)
    for name in names:
        assert await labels(database, guest, name) == ["birds@1"]
        assert await labels(database, third, name) is None
    assert await labels(database, guest, "birds") is None
    for disabled_ms, expected in ((1, None), (None, ["birds@1"])):
        async with database.writing() as session:
            (await tenants.find_tenant(session, owner.id)).disabled_ms = disabled_ms
        for name in names:
            assert await labels(database, guest, name) == expected
    async with database.writing() as session:
        await adapters.unshare(session, adapter, guest)
    for name in names:
        assert await labels(database, guest, name) is None


async def test_a_tenant_goes_with_all_it_has_and_its_usage_stays(database: Database) -> None:
    tenant = await make_tenant(database, "acme")
    await make_version(database, tenant, digest="a" * 64)
    await make_version(database, tenant, digest="b" * 64)
    async with database.writing() as session:
        await keys.create_key(session, tenant, "owner")
    await database.commit(partial(usage.settle, endings=[ending(opening("r1", tenant.id))]))
    async with database.writing() as session:
        gone = await tenants.delete_tenant(session, await tenants.find_tenant(session, "acme"))
    assert gone == {"a" * 64, "b" * 64}
    async with database.reading() as session:
        assert await session.scalar(select(Version)) is None
        assert await session.scalar(select(Key)) is None
        assert await session.scalar(select(Usage)) is not None


async def test_a_request_is_counted_once_however_often_it_is_settled(database: Database) -> None:
    begun = opening("r1")
    for _ in range(2):
        await database.commit(partial(usage.admit, openings=[begun]))
        await database.commit(partial(usage.settle, endings=[ending(begun)]))
    assert await database.commit(partial(usage.recover, gateway="g", older_than_ms=0)) == 0
    async with database.reading() as session:
        (total,) = await usage.totals(session, tenant_id="t", start_ms=0, end_ms=now_ms() + 1)
    assert (total.requests, total.prompt_tokens, total.cached_tokens, total.completion_tokens) == (
        1,
        5,
        2,
        7,
    )


async def test_what_a_dead_gateway_left_is_found_once(database: Database) -> None:
    found = [opening("mine"), opening("theirs", gateway="h"), opening("old", "t", 1, "h")]
    await database.commit(partial(usage.admit, openings=found))
    recovered = 0
    for _ in range(2):
        recovered += await database.commit(partial(usage.recover, gateway="g", older_than_ms=1000))
    assert recovered == 2
    async with database.reading() as session:
        rows = {row.request_id: row.status for row in (await session.scalars(select(Usage))).all()}
    assert rows == {"mine": "interrupted", "old": "interrupted"}


async def test_usage_is_summed_by_bucket_and_group_of_one_tenant(database: Database) -> None:
    hour = 3_600_000
    endings = [
        ending(opening(f"r{k}", "t" if k else "other", (k // 2) * hour + 5), tokens=10**k)
        for k in range(4)
    ]
    await database.commit(partial(usage.settle, endings=endings))
    async with database.reading() as session:
        found = await usage.totals(
            session,
            tenant_id="t",
            start_ms=0,
            end_ms=10 * hour,
            bucket="hour",
            group_by=["model", "status"],
        )
    assert [(t.start_ms, t.group, t.requests, t.completion_tokens) for t in found] == [
        (0, {"model": "birds", "status": "completed"}, 1, 10),
        (hour, {"model": "birds", "status": "completed"}, 2, 1100),
    ]


async def test_the_audit_log_is_read_by_pages_of_one_tenant(database: Database) -> None:
    async with database.writing() as session:
        for k in range(5):
            audit.record(
                session, audit.Actor("key"), "key.create", f"k{k}", "t" if k % 2 else None, n=k
            )
    async with database.reading() as session:
        everything = await audit.list_audit(session, None)
        assert [entry.subject for entry in everything] == ["k4", "k3", "k2", "k1", "k0"]
        page = await audit.list_audit(session, "t", after=everything[1].id, limit=1)
    assert [(entry.subject, entry.details) for entry in page] == [("k1", {"n": 1})]


async def test_many_writers_at_once_lose_nothing(database: Database) -> None:
    others = [
        database,
        *(Database(str(database.engine.url.render_as_string(False))) for _ in range(2)),
    ]

    async def write(k: int) -> None:
        def written(connection: Connection) -> None:
            usage.admit(connection, [begun])
            usage.settle(connection, [ending(begun, 1)])

        begun = opening(f"r{k}")
        await others[k % 3].commit(written)

    await asyncio.gather(*(write(k) for k in range(60)))
    async with database.reading() as session:
        (total,) = await usage.totals(session, tenant_id=None, start_ms=0, end_ms=now_ms() + 1)
    assert (total.requests, total.completion_tokens) == (60, 60)
    for other in others[1:]:
        await other.close()


_WRITER = """
import asyncio, sys
from reft_serve.database.connection import Database
from reft_serve.database import usage
from reft_serve.database.models import now_ms

async def main():
    database = Database(sys.argv[1])
    for k in range(100000):
        begun = usage.Opening(f"r{k}", "g", "t", "k", "chat", "m", None, now_ms())
        await database.commit(lambda connection: usage.admit(connection, [begun]))
        print("begun", k, flush=True)
        done = usage.Ending(begun, "completed", 1, 0, 1, now_ms())
        await database.commit(lambda connection: usage.settle(connection, [done]))
        print("ended", k, flush=True)

asyncio.run(main())
"""


async def test_what_a_killed_process_was_told_is_committed_is_there(
    database: Database, tmp_path: Path
) -> None:
    url = database.engine.url.render_as_string(False)
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITER, url], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    told = [writer.stdout.readline() for _ in range(41)]
    os.kill(writer.pid, signal.SIGKILL)
    told += writer.stdout.read().splitlines(keepends=True)
    writer.wait()
    whole = [line.split() for line in told if line.endswith("\n")]
    begun, ended = (
        {int(k) for word, k in whole if word == wanted} for wanted in ("begun", "ended")
    )
    await database.commit(partial(usage.recover, gateway="g", older_than_ms=0))
    async with database.reading() as session:
        rows = {
            int(row.request_id[1:]): row.status
            for row in (await session.scalars(select(Usage))).all()
        }
    assert begun <= rows.keys()
    assert {k for k, status in rows.items() if status == "completed"} >= ended
    assert len(rows) <= max(begun) + 2


async def test_a_schema_is_taken_when_it_is_this_versions_or_a_later_one(database_url: str) -> None:
    opened = Database(database_url)
    try:
        with pytest.raises(
            DatabaseUnusable, match=r"has schema none .* run `reft-serve admin migrate`"
        ):
            await check_schema(opened)
        await migrate(opened)
        head = await check_schema(opened)
        for revision, taken in (("9999", True), (head, True), (None, False)):
            async with opened.engine.begin() as connection:
                await connection.execute(text("DELETE FROM alembic_version"))
                if revision is not None:
                    await connection.execute(
                        text("INSERT INTO alembic_version VALUES (:r)"), {"r": revision}
                    )
            if taken:
                assert await check_schema(opened) == revision
            else:
                with pytest.raises(DatabaseUnusable):
                    await check_schema(opened)
    finally:
        await opened.close()


async def test_an_error_shows_no_value_of_its_statement(database: Database) -> None:
    for statement in ("INSERT INTO nowhere VALUES (:secret)", "SELECT :secret FROM nowhere"):
        with pytest.raises(DBAPIError) as caught:
            async with database.writing() as session:
                await session.execute(text(statement), {"secret": "whsec_hidden"})
        assert "nowhere" in str(caught.value)
        assert "whsec_hidden" not in str(caught.value)


async def test_a_commit_waits_for_one_writing_session_however_many_wait(database: Database) -> None:
    order: list[str] = []

    async def session(name: str) -> None:
        async with database.writing() as opened:
            await opened.execute(select(Tenant.id))
            await asyncio.sleep(0.05)
            order.append(name)

    async def commit() -> None:
        await database.commit(lambda connection: connection.execute(text("SELECT 1")))
        order.append("commit")

    async with asyncio.TaskGroup() as group:
        for number in range(8):
            group.create_task(session(f"session {number}"))
        await asyncio.sleep(0.02)
        group.create_task(commit())
    assert order.index("commit") <= 1
    assert len(order) == 9
