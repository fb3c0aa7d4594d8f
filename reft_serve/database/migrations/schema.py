"""The schema of the database: its revision, and its migration to this version of the package."""

from __future__ import annotations

import logging
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from reft_serve.database.connection import Database, reason_of
from reft_serve.errors import DatabaseUnusable

__all__ = ["check_schema", "migrate", "revision_of"]

_log = logging.getLogger(__name__)
_SCRIPTS = Path(__file__).parent
# Any number does, as long as nothing else of ours locks it.
_MIGRATION_LOCK = 0x5EF7
_TABLE_LOCK_SECONDS = 5


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
        raise DatabaseUnusable(f"database error: {reason_of(exc)}") from exc


async def check_schema(database: Database) -> str:
    """The schema's revision, where this version of the package can work with it: its own or a later
    one.

    A step only adds (see docs/runbook.md), so that a database may be migrated before the processes
    are upgraded.

    Raises:
        DatabaseUnusable: the database cannot be reached, or must be migrated first.
    """
    revision = await revision_of(database)
    steps = ScriptDirectory.from_config(_alembic())
    needed = steps.get_current_head()
    known = {script.revision for script in steps.walk_revisions()}
    if revision is None or (revision in known and revision != needed):
        raise DatabaseUnusable(
            f"the database has schema {revision or 'none'} and this version needs {needed}: run "
            "`reft-serve admin migrate`"
        )
    if revision not in known:
        _log.warning(
            "the database has a later schema", extra={"data": {"found": revision, "known": needed}}
        )
    return revision


async def revision_of(database: Database) -> str | None:
    """The schema's revision; None if there are no tables.

    Raises:
        DatabaseUnusable: the database cannot be reached.
    """
    try:
        async with database.engine.connect() as connection:
            return await connection.run_sync(_revision)
    except (DBAPIError, OSError) as exc:
        raise DatabaseUnusable(f"database error: {reason_of(exc)}") from exc


def _alembic() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
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
    current = _revision(connection)
    for each, whose in (
        (current, "the database has"),
        (None if revision == "head" else revision, "the data has"),
    ):
        if each is not None and each not in known:
            raise DatabaseUnusable(
                f"{whose} schema {each}, which this version does not know: upgrade reft-serve"
            )
    command.upgrade(config, revision)
