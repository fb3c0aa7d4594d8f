"""One database, SQLite or PostgreSQL by its URL: opened, migrated, read and written in transactions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from reft_serve.errors import DatabaseUnusable

__all__ = ["Database", "migrate"]

_DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg", "postgres": "postgresql+asyncpg"}
_BUSY_SECONDS = 15
_MIGRATIONS = Path(__file__).with_name("migrations")
# Any number does, as long as nothing else of ours locks it.
_MIGRATION_LOCK = 0x5EF7


class Database:
    """A pool of connections. `reading` and `writing` each give a session in one transaction of its own."""

    def __init__(self, url: str) -> None:
        """Open lazily: the first session connects.

        Args:
            url: `sqlite:///PATH` or `postgresql://USER:PASSWORD@HOST/NAME`.

        Raises:
            DatabaseUnusable: the URL is neither.
        """
        self.engine = _engine(url)
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        options: dict[str, Any] = {"expire_on_commit": False, "autobegin": True}
        self._readers = async_sessionmaker(self.engine, **options)
        self._writers = async_sessionmaker(self.engine.execution_options(reft_writes=True), **options)
        # SQLite takes one writer at a time; to wait here is cheaper than to poll its lock.
        self._turn = asyncio.Lock() if self.is_sqlite else None

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncSession]:
        """A session for looking only."""
        async with self._readers() as session:
            yield session

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncSession]:
        """A session whose changes are committed at the end, all of them or, after an exception, none."""
        async with AsyncExitStack() as stack:
            if self._turn is not None:
                await stack.enter_async_context(self._turn)
            session = await stack.enter_async_context(self._writers())
            async with session.begin():
                yield session

    async def lock(self, session: AsyncSession, name: str) -> None:
        """Hold `name` until the session's transaction ends. (A writer of SQLite holds everything already.)"""
        if not self.is_sqlite:
            await session.execute(text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))"), {"name": name})

    async def ping(self) -> None:
        """Raise DatabaseUnusable where the database does not answer."""
        try:
            async with self.reading() as session:
                await session.execute(text("SELECT 1"))
        except (DBAPIError, OSError) as exc:
            raise DatabaseUnusable(f"the database does not answer: {_reason(exc)}") from exc

    async def close(self) -> None:
        """Close every connection."""
        await self.engine.dispose()


async def migrate(database: Database) -> None:
    """Bring the schema to what this version of the package needs. Safe to run by several processes at once.

    Raises:
        DatabaseUnusable: it cannot be reached, or is of a later version than this package.
    """
    try:
        async with database.engine.execution_options(reft_writes=True).begin() as connection:
            await connection.run_sync(_upgrade)
    except (DBAPIError, OSError) as exc:
        raise DatabaseUnusable(f"the database cannot be used: {_reason(exc)}") from exc


def _upgrade(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _MIGRATION_LOCK})
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    found = MigrationContext.configure(connection).get_current_revision()
    if found is not None and found not in known:
        raise DatabaseUnusable(f"the database has schema {found}, which this version does not know: upgrade reft-serve")
    command.upgrade(config, "head")


def _engine(url: str) -> AsyncEngine:
    try:
        parsed = make_url(url)
    except ArgumentError as exc:
        raise DatabaseUnusable("the database URL cannot be read: give sqlite:///PATH or postgresql://...") from exc
    family = parsed.drivername.partition("+")[0]
    if family not in _DRIVERS:
        raise DatabaseUnusable(f"the database {family[:40]!r} is not known: give sqlite:///PATH or postgresql://...")
    parsed = parsed.set(drivername=_DRIVERS[family])
    if family == "sqlite":
        return _sqlite(parsed)
    return create_async_engine(parsed, pool_size=10, max_overflow=10, pool_pre_ping=True)


def _sqlite(url: Any) -> AsyncEngine:
    if not url.database or url.database == ":memory:":
        raise DatabaseUnusable("give SQLite a file: sqlite:///PATH")
    Path(url.database).expanduser().parent.mkdir(parents=True, exist_ok=True)
    engine = create_async_engine(
        url.set(database=str(Path(url.database).expanduser())), connect_args={"timeout": _BUSY_SECONDS}
    )

    @event.listens_for(engine.sync_engine, "connect")
    def _connected(connection: Any, _: object) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves
        cursor = connection.cursor()
        # With WAL, NORMAL survives the death of any process; only a power cut can take the last transactions.
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", f"busy_timeout={_BUSY_SECONDS}000"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def _begun(connection: Connection) -> None:
        # A transaction that reads and then writes could not get the lock later without losing what it has read.
        writes = connection.get_execution_options().get("reft_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _reason(exc: BaseException) -> str:
    """One line without the statement and its parameters, which may hold what nobody should read."""
    cause = getattr(exc, "orig", None) or exc
    return " ".join(str(cause).split())[:200]
