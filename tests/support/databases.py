"""New databases for tests. Each is a copy of one that was migrated once: most tests take less time than migrations."""

from __future__ import annotations

import secrets
import tempfile
from pathlib import Path

from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from reft_serve.database.connection import Database
from reft_serve.database.migrations.schema import migrate

_SQLITE: list[bytes] = []
_POSTGRES: dict[str, str] = {}


async def new_sqlite(url: str) -> None:
    """Make the database of a URL, `sqlite:///PATH`, with this version's schema. Leave one that exists as it is."""
    path = Path(url.removeprefix("sqlite:///"))
    if path.exists():
        return
    if not _SQLITE:
        with tempfile.TemporaryDirectory() as folder:
            await _migrated(f"sqlite:///{folder}/reft.db")
            _SQLITE.append((Path(folder) / "reft.db").read_bytes())
    path.touch(0o600)
    path.write_bytes(_SQLITE[0])


async def new_postgres(server: str, *, migrated: bool = True) -> str:
    """A new database on a server: its URL. With this version's schema, or with nothing in it."""
    if not migrated:
        return await _create(server, "")
    if server not in _POSTGRES:
        _POSTGRES[server] = await _create(server, "")
        await _migrated(_POSTGRES[server])
    return await _create(server, f" TEMPLATE {_POSTGRES[server].rpartition('/')[2]}")


async def _create(server: str, template: str) -> str:
    name = f"test_{secrets.token_hex(6)}"
    engine = create_async_engine(
        server.replace("postgresql://", "postgresql+asyncpg://"), isolation_level="AUTOCOMMIT"
    )
    async with engine.connect() as connection:
        await connection.execute(text(f"CREATE DATABASE {name}{template}"))
    await engine.dispose()
    return f"{server.rpartition('/')[0]}/{name}"


async def _migrated(url: str) -> None:
    database = Database(url)
    await migrate(database)
    await database.close()
