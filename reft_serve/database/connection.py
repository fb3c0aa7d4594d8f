"""One database, SQLite or PostgreSQL by its URL: opened, read and written in transactions."""

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
    "database_user",
    "insert_new",
    "reason_of",
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
            raise DatabaseUnusable(f"the database does not respond: {reason_of(exc)}") from exc

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


def reason_of(exc: BaseException) -> str:
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
