"""A backup under load gives back every adapter, job, file and usage record, on either database; a damaged one is refused."""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import MetaData, select

from reft_serve.adapters.store import AdapterStore
from reft_serve.backup import Stores, back_up, bring_back
from reft_serve.database import keys, tenants
from reft_serve.database.connection import Database
from reft_serve.database.files import key_of_blob
from reft_serve.database.migrations.schema import migrate
from reft_serve.database.models import Event, File, Job
from reft_serve.errors import Conflict, DatabaseUnusable, StoreUnusable
from reft_serve.storage.blobs import BlobStore
from reft_serve.testing import FakeEngine
from tests.support.deploy.load import asking
from tests.support.gateway.harness import Gateway, Served, running
from tests.support.postgres import execute, postgres_server

BOTH = ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres_server() as url:
        yield url


def new_database(kind: str, folder: Path, request: pytest.FixtureRequest) -> str:
    """The URL of a database with nothing in it."""
    name = f"backup_{secrets.token_hex(6)}"
    if kind == "sqlite":
        return f"sqlite:///{folder / name}.db"
    url = request.getfixturevalue("server")
    execute(url, f"CREATE DATABASE {name}")
    return f"{url.rpartition('/')[0]}/{name}"


@asynccontextmanager
async def places(url: str, folder: Path) -> AsyncIterator[Stores]:
    database = Database(url)
    try:
        yield Stores(database, AdapterStore(folder / "store"), BlobStore(str(folder / "blobs")))
    finally:
        await database.close()


async def contents(url: str) -> dict[str, list[Any]]:
    """Every row of every table."""
    database = Database(url)
    async with database.engine.connect() as connection:

        def reflected(sync: Any) -> MetaData:
            found = MetaData()
            found.reflect(sync)
            return found

        metadata = await connection.run_sync(reflected)
        found = {
            table.name: [
                list(row)
                for row in await connection.execute(
                    select(table).order_by(*table.primary_key.columns)
                )
            ]
            for table in metadata.sorted_tables
        }
    await database.close()
    return found


async def fill(url: str, folder: Path) -> None:
    """What a gateway over a fake engine cannot make: a job with its events, a file with its bytes, odd values."""
    async with places(url, folder) as site:
        async with site.database.writing() as session:
            tenant = await tenants.create_tenant(session, "odd", {"choices": 3})
            await keys.create_key(
                session, tenant, "owner", 'quotes " and \n and ÿ and 日本', scopes=["usage"]
            )
            job = Job(
                id="ftjob-1", tenant_id=tenant.id, status="succeeded", model="base", training_file_id="file-1", seed=2**40,
                adapter="cats", error=None, metadata_={"a": "null"}, hyperparameters={"x": [1.5, None, True]},
            )  # fmt: skip
            session.add(job)
            session.add(
                File(
                    id="file-1",
                    tenant_id=tenant.id,
                    filename="d.jsonl",
                    purpose="fine-tune",
                    status="processed",
                )
            )
            session.add(
                File(
                    id="file-2",
                    tenant_id=tenant.id,
                    filename="x",
                    purpose="fine-tune",
                    status="uploading",
                )
            )
            await session.flush()
            for number in range(5):
                data = None if number % 2 else {"loss": 1 / 3}
                session.add(
                    Event(
                        id=f"e{number}",
                        job_id=job.id,
                        level="info",
                        type="metrics",
                        message="m",
                        data=data,
                    )
                )

        async def chunks() -> AsyncIterator[bytes]:
            yield b"x" * 100_000

        await site.blobs.write(key_of_blob("file-1"), chunks(), 1 << 20)
        await site.blobs.write("checkpoints/ftjob-1/step-000000001.tar", chunks(), 1 << 20)


@pytest.mark.parametrize("target", BOTH)
@pytest.mark.parametrize("source", BOTH)
def test_a_backup_under_load_gives_everything_back(
    tmp_path: Path, request: pytest.FixtureRequest, source: str, target: str
) -> None:
    url, new = new_database(source, tmp_path, request), new_database(target, tmp_path, request)
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    away.mkdir()
    with running(home, database=url) as (gateway, _):
        tenant = gateway.tenant("acme")
        for seed in (1, 2, 3):
            assert tenant.upload(f"a{seed % 2}", seed, alias="production").status_code == 201
        asyncio.run(fill(url, home))
        with asking(gateway.url, [tenant.key], ["base", "a1", "a0@1"], callers=3) as tally:
            tally.grow(20)

            async def backed_up() -> None:
                async with places(url, home) as site:
                    await back_up(site, tmp_path / "backup")

            asyncio.run(backed_up())
            tally.grow(20)
        assert tally.failures == []
        at_end = asyncio.run(contents(url))

    async def brought_back() -> None:
        async with places(new, away) as site:
            await bring_back(site, tmp_path / "backup")
            with pytest.raises(Conflict, match="is not empty"):
                await bring_back(site, tmp_path / "backup")

    asyncio.run(brought_back())
    found = asyncio.run(contents(new))
    assert {
        name: len(rows) for name, rows in found.items() if name not in ("usage", "admissions")
    } == {name: len(rows) for name, rows in at_end.items() if name not in ("usage", "admissions")}
    for (
        name,
        rows,
    ) in found.items():  # the moment of the backup: what came after it is the only difference
        if name in ("usage", "audit"):
            assert rows == at_end[name][: len(rows)], name
        elif name != "admissions":
            assert rows == at_end[name], name
    assert len(found["usage"]) + len(found["admissions"]) >= 20
    assert files_in(away / "store") == files_in(home / "store")
    assert files_in(away / "blobs") == files_in(home / "blobs")
    work_on(away, new, tenant.key, len(found["usage"]))


def files_in(folder: Path) -> dict[str, bytes]:
    found = [
        path
        for path in folder.rglob("*")
        if path.is_file() and not path.parts[len(folder.parts)].startswith(".")
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def work_on(folder: Path, url: str, key: str, records: int) -> None:
    """A gateway over what was brought back answers with the old keys and adapters, and goes on counting."""
    engine = FakeEngine()
    served = Served(engine.app)
    gateway = Gateway(folder, served.url, database=url, gateway_name="another")
    try:
        with gateway.http(key) as client:
            for model in ("a1", "a0@1"):
                body = {"model": model, "prompt": "x", "max_tokens": 3}
                assert client.post("/v1/completions", json=body).status_code == 200
            total = sum(each["requests"] for each in client.get("/v1/usage").json()["data"])
            assert total >= records + 2
            assert len(engine.adapters) == 2
    finally:
        gateway.stop()
        served.stop()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backup to damage."""
    folder = tmp_path_factory.mktemp("whole")

    async def made() -> None:
        async with places(f"sqlite:///{folder}/reft.db", folder) as site:
            await migrate(site.database)
            async with site.database.writing() as session:
                await tenants.create_tenant(session, "acme")
            with site.store.staging() as staged:
                (staged / "reft_config.json").write_text("{}")
                site.store.publish(staged)
        await fill(f"sqlite:///{folder}/reft.db", folder)
        async with places(f"sqlite:///{folder}/reft.db", folder) as site:
            await back_up(site, folder / "backup")

    asyncio.run(made())
    return folder / "backup"


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _edit_json(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "backup.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


DAMAGE = {
    "not ended": (lambda folder: (folder / "backup.json").unlink(), "no backup.json"),
    "facts cut": (lambda folder: _cut(folder / "backup.json"), "is damaged"),
    "another format": (lambda folder: _edit_json(folder, {"format": 2}), "another format"),
    "a strange fact": (lambda folder: _edit_json(folder, {"colour": 1}), "is damaged"),
    "a path for a version": (lambda folder: _edit_json(folder, {"versions": ["../../etc"]}), "not a version or file"),
    "a path for a file": (lambda folder: _edit_json(folder, {"blobs": {"../x": [1, "a"]}}), "not a version or file"),
    "facts of another sort": (lambda folder: _edit_json(folder, {"blobs": {"files/a": 3}}), "is damaged"),
    "a later schema": (lambda folder: _edit_json(folder, {"revision": "9999"}), "9999"),
    "a table cut": (lambda folder: _cut(folder / "database" / "tenants.jsonl.gz"), "tenants.jsonl.gz cannot be read"),
    "a table gone": (lambda folder: (folder / "database" / "keys.jsonl.gz").unlink(), "keys.jsonl.gz cannot be read"),
    "a table of another": (
        lambda folder: shutil.copy(folder / "database" / "keys.jsonl.gz", folder / "database" / "jobs.jsonl.gz"),
        "does not match the columns",
    ),
    "a version changed": (
        lambda folder: next((folder / "adapters").glob("??/*/reft_config.json")).write_text("{ }"), "do not match its digest",
    ),
    "a version gone": (lambda folder: shutil.rmtree(next((folder / "adapters").glob("??"))), "is missing"),
    "a blob changed": (lambda folder: (folder / "blobs" / "files" / "file-1").write_text("y"), "blob files/file-1"),
    "a blob gone": (lambda folder: (folder / "blobs" / "files" / "file-1").unlink(), "file"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_backup_is_refused_and_no_row_put_in(
    tmp_path: Path, whole: Path, damage: str
) -> None:
    change, phrase = DAMAGE[damage]
    shutil.copytree(whole, tmp_path / "backup")
    change(tmp_path / "backup")  # type: ignore[no-untyped-call]

    async def tried() -> None:
        async with places(f"sqlite:///{tmp_path}/new.db", tmp_path) as site:
            with pytest.raises((StoreUnusable, DatabaseUnusable, Conflict), match=phrase):
                await bring_back(site, tmp_path / "backup")

    asyncio.run(tried())
    if (tmp_path / "new.db").exists():
        found = asyncio.run(contents(f"sqlite:///{tmp_path}/new.db"))
        assert not any(rows for name, rows in found.items() if name != "alembic_version")


def test_a_backup_names_what_the_stores_lack_and_overwrites_nothing(tmp_path: Path) -> None:
    async def tried() -> None:
        async with places(f"sqlite:///{tmp_path}/reft.db", tmp_path) as site:
            with pytest.raises(DatabaseUnusable, match="admin migrate"):
                await back_up(site, tmp_path / "unmigrated")
            await migrate(site.database)
            async with site.database.writing() as session:
                session.add(
                    File(
                        id="file-9",
                        tenant_id="t",
                        filename="x",
                        purpose="fine-tune",
                        status="processed",
                    )
                )
            with pytest.raises(StoreUnusable, match="files/file-9"):
                await back_up(site, tmp_path / "lacking")
            assert not (tmp_path / "lacking" / "backup.json").exists()
            with pytest.raises(Conflict, match="already exists"):
                await back_up(site, tmp_path / "lacking")

    asyncio.run(tried())
    assert (tmp_path / "lacking").stat().st_mode & 0o077 == 0
