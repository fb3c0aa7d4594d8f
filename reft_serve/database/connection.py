"""One database, SQLite or PostgreSQL by its URL: opened, migrated, read and written in
transactions.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from asyncpg.exceptions import InterfaceError, PostgresError
from sqlalchemy import URL, Connection, Dialect, Engine, create_engine, event, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as SQLAlchemyTimeout
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from reft_serve.database.models import Base
from reft_serve.errors import DatabaseUnusable

__all__ = [
    "CLOSE_SECONDS",
    "FAILURES",
    "SESSIONS_PER_TENANT",
    "Database",
    "check_schema",
    "database_user",
    "insert_new",
    "migrate",
    "revision_of",
]

# What a session raises while the database is away, or breaks off: to try again makes sense.
FAILURES: tuple[type[Exception], ...] = (
    DBAPIError,
    SQLAlchemyTimeout,
    PostgresError,
    InterfaceError,
    OSError,
    DatabaseUnusable,
)
# An error shows its statement without the values: they may be secrets, and errors are logged.
_QUIET = {"hide_parameters": True}
_log = logging.getLogger(__name__)

_DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "postgresql": "postgresql+asyncpg",
    "postgres": "postgresql+asyncpg",
}
_BUSY_SECONDS = 15
_MIGRATIONS = Path(__file__).with_name("migrations")
# Any number does, as long as nothing else of ours locks it.
_MIGRATION_LOCK = 0x5EF7
_TABLE_LOCK_SECONDS = 5
CLOSE_SECONDS = 5.0
"""Seconds that a process waits at shutdown for an unresponsive database."""
SESSIONS_PER_TENANT = 4
database_user: ContextVar[str | None] = ContextVar("database_user", default=None)
"""The tenant on whose behalf the database is queried; None: this process itself."""
_has_session: ContextVar[bool] = ContextVar("has_session", default=False)
_T = TypeVar("_T")


class Database:
    """A pool of connections. `reading` and `writing` each give a session in its own transaction;
    `commit` runs a function in one.
    """

    def __init__(self, url: str) -> None:
        """Open lazily: the first session connects.

        Args:
            url: `sqlite:///PATH` or `postgresql://USER:PASSWORD@HOST/NAME`.

        Raises:
            DatabaseUnusable: the URL is neither.
        """
        self.engine = _engine(url)
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        # A look-up for inference never waits for a connection that a list has.
        self._lookups = _engine(url)
        self._shares: dict[str, _Share] = {}
        options: dict[str, Any] = {"expire_on_commit": False, "autobegin": True}
        self._lookers = async_sessionmaker(self._lookups, **options)
        self._readers = async_sessionmaker(self.engine, **options)
        self._writers = async_sessionmaker(
            self.engine.execution_options(reft_writes=True), **options
        )
        # SQLite takes one writer at a time; to wait here is cheaper than to poll its lock. A commit
        # waits for one session at most, however many sessions wait: usage records must not queue
        # behind a tenant's management requests.
        self._turn = asyncio.Lock() if self.is_sqlite else None
        self._session_turn = asyncio.Lock()
        self._thread = _WriterThread(self.engine.url) if self.is_sqlite else None

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncSession]:
        """A session for looking only."""
        async with self._share(), self._readers() as session:
            yield session

    async def read(self, query: Callable[[AsyncSession], Awaitable[_T]]) -> _T:
        """Run a read-only `query` in a session from a dedicated connection pool, for short look-ups
        of requests. If its connection is cut, it is retried once on another.
        """
        try:
            async with self._lookers() as session:
                return await query(session)
        except DBAPIError as exc:
            if not exc.connection_invalidated:
                raise
        async with self._lookers() as session:
            return await query(session)

    @asynccontextmanager
    async def _share(self) -> AsyncIterator[None]:
        """Wait until the tenant of this request has fewer than SESSIONS_PER_TENANT sessions. (One
        within another counts once: it must not wait for itself.)
        """
        user = database_user.get()
        if user is None or _has_session.get():
            yield
            return
        share = self._shares.setdefault(user, _Share())
        share.users += 1
        try:
            async with share.turns:
                _has_session.set(True)
                try:
                    yield
                finally:
                    _has_session.set(False)
        finally:
            share.users -= 1
            if not share.users:
                del self._shares[user]

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncSession]:
        """A session whose changes are committed at the end, all of them or, after an exception,
        none.
        """
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._share())
            if self._turn is not None:
                await stack.enter_async_context(self._session_turn)
                await stack.enter_async_context(self._turn)
            session = await stack.enter_async_context(self._writers())
            async with session.begin():
                yield session

    async def commit(self, work: Callable[[Connection], _T]) -> _T:
        """Run `work` in a transaction: commit at its end, roll back after an exception, and return
        its result.

        For the work of every request: on SQLite a session changes threads at each of its steps, and
        each time waits for the interpreter's lock; this changes once.
        """
        if self._thread is None or self._turn is None:
            async with self.engine.begin() as connection:
                return await connection.run_sync(work)
        async with self._turn:
            return await self._thread.commit(work)

    async def lock(self, session: AsyncSession, name: str) -> None:
        """Hold `name` until the session's transaction ends. (A writer of SQLite holds everything
        already.)
        """
        if not self.is_sqlite:
            await session.execute(
                text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))"), {"name": name}
            )

    async def ping(self) -> None:
        """Raise DatabaseUnusable where the database does not answer."""
        try:
            async with self.reading() as session:
                await session.execute(text("SELECT 1"))
        except (DBAPIError, OSError) as exc:
            raise DatabaseUnusable(f"the database does not respond: {_reason(exc)}") from exc

    async def close(self) -> None:
        """Close every connection, within about `CLOSE_SECONDS`: those of a database that cannot be
        reached are dropped.
        """
        closing = asyncio.ensure_future(self._close())
        await asyncio.wait([closing], timeout=CLOSE_SECONDS)
        if not closing.done():
            _log.warning("the database connections did not close in time and were dropped")
            closing.cancel()
            await asyncio.wait([closing], timeout=CLOSE_SECONDS / 5)
        elif closing.exception() is not None:
            _log.warning(
                "the database's connections could not be closed", exc_info=closing.exception()
            )

    async def _close(self) -> None:
        await self._lookups.dispose()
        await self.engine.dispose()
        if self._thread is not None:
            await self._thread.close()


class _Share:
    """A tenant's part of the connections. `users`: those that hold or await one."""

    def __init__(self) -> None:
        self.users = 0
        self.turns = asyncio.Semaphore(SESSIONS_PER_TENANT)


class _WriterThread:
    """A thread with its own connection to a SQLite file."""

    def __init__(self, url: URL) -> None:
        self._executor = ThreadPoolExecutor(1, "reft-database")
        self._engine = create_engine(
            url.set(drivername="sqlite"), connect_args={"timeout": _BUSY_SECONDS}, **_QUIET
        )
        self._writer = self._engine.execution_options(reft_writes=True)
        _prepare(self._engine)

    async def commit(self, work: Callable[[Connection], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, self._committed, work
        )

    def _committed(self, work: Callable[[Connection], _T]) -> _T:
        with self._writer.begin() as connection:
            return work(connection)

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._executor, self._engine.dispose)
        self._executor.shutdown()


async def migrate(database: Database, revision: str = "head") -> None:
    """Migrate the schema to this version of the package. Safe to run by several processes at once,
    and next to processes that work on the database.

    Args:
        revision: where to stop, for data that was written at an earlier schema.

    Raises:
        DatabaseUnusable: it cannot be reached, or is of a later version than this package.
    """
    try:
        async with database.engine.execution_options(reft_writes=True).begin() as connection:
            await connection.run_sync(_upgrade, revision)
    except (DBAPIError, OSError) as exc:
        raise DatabaseUnusable(f"database error: {_reason(exc)}") from exc


async def check_schema(database: Database) -> str:
    """The schema's revision, where this version of the package can work with it: its own or a later
    one.

    A step only adds (see docs/runbook.md), so that a database may be migrated before the processes
    are upgraded.

    Raises:
        DatabaseUnusable: the database cannot be reached, or must be migrated first.
    """
    found = await revision_of(database)
    steps = ScriptDirectory.from_config(_alembic())
    needed = steps.get_current_head()
    known = {script.revision for script in steps.walk_revisions()}
    if found is None or (found in known and found != needed):
        raise DatabaseUnusable(
            f"the database has schema {found or 'none'} and this version needs {needed}: run "
            "`reft-serve admin migrate`"
        )
    if found not in known:
        _log.warning(
            "the database has a later schema", extra={"data": {"found": found, "known": needed}}
        )
    return found


async def revision_of(database: Database) -> str | None:
    """The schema's revision; None if there are no tables.

    Raises:
        DatabaseUnusable: the database cannot be reached.
    """
    try:
        async with database.engine.connect() as connection:
            return await connection.run_sync(_revision)
    except (DBAPIError, OSError) as exc:
        raise DatabaseUnusable(f"database error: {_reason(exc)}") from exc


def _alembic() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    return config


def _revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _upgrade(connection: Connection, revision: str) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(
            text("SELECT pg_advisory_xact_lock(:number)"), {"number": _MIGRATION_LOCK}
        )
        # A step that waits for a table makes everybody behind it wait too: better to fail, and be
        # tried again.
        connection.execute(text(f"SET LOCAL lock_timeout = '{_TABLE_LOCK_SECONDS}s'"))
    config = _alembic()
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    found = _revision(connection)
    for each, whose in (
        (found, "the database has"),
        (None if revision == "head" else revision, "the data has"),
    ):
        if each is not None and each not in known:
            raise DatabaseUnusable(
                f"{whose} schema {each}, which this version does not know: upgrade reft-serve"
            )
    command.upgrade(config, revision)


def _engine(url: str) -> AsyncEngine:
    try:
        parsed = make_url(url)
    except ArgumentError as exc:
        raise DatabaseUnusable(
            "the database URL is invalid: use sqlite:///PATH or postgresql://..."
        ) from exc
    family = parsed.drivername.partition("+")[0]
    if family not in _DRIVERS:
        raise DatabaseUnusable(
            f"the database {family[:40]!r} is not supported: use sqlite:///PATH or postgresql://..."
        )
    parsed = parsed.set(drivername=_DRIVERS[family])
    if family == "sqlite":
        return _sqlite(parsed)
    return create_async_engine(parsed, pool_size=10, max_overflow=10, pool_pre_ping=True, **_QUIET)


def _sqlite(url: Any) -> AsyncEngine:
    if not url.database or url.database == ":memory:":
        raise DatabaseUnusable("SQLite needs a file: sqlite:///PATH")
    path = Path(url.database).expanduser()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # The owner's alone: it holds secrets. SQLite gives its other files the same permissions.
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
    engine = create_async_engine(
        url.set(database=str(path)), connect_args={"timeout": _BUSY_SECONDS}, **_QUIET
    )
    _prepare(engine.sync_engine)
    return engine


def _prepare(engine: Engine) -> None:
    """Set busy timeout, WAL and foreign keys on every SQLite connection."""

    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _: object) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves
        cursor = connection.cursor()
        # With WAL, NORMAL survives the death of any process; only a power cut can take the last
        # transactions.
        for pragma in (
            "journal_mode=WAL",
            "synchronous=NORMAL",
            "foreign_keys=ON",
            f"busy_timeout={_BUSY_SECONDS}000",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        # A transaction that reads and then writes could not get the lock later without losing what
        # it has read.
        writes = connection.get_execution_options().get("reft_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _reason(exc: BaseException) -> str:
    """One line without the statement and its parameters, which may hold secrets."""
    cause = getattr(exc, "orig", None) or exc
    return " ".join(str(cause).split())[:200]


def insert_new(
    dialect: Dialect, table: type[Base], unique: Sequence[str]
) -> postgresql.Insert | sqlite.Insert:
    """The statement that inserts rows except those whose `unique` columns are taken: what is there
    stays as it is.
    """
    if dialect.name == "postgresql":
        return postgresql.insert(table).on_conflict_do_nothing(index_elements=list(unique))
    return sqlite.insert(table).on_conflict_do_nothing(index_elements=list(unique))
