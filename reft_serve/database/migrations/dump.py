"""Every row of a database in files, and back: one format for SQLite and PostgreSQL, so that one can
become the other.

A table is `NAME.jsonl.gz`, a row of values per line. What is written is one moment of the database,
however long it takes.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import JSON, Connection, MetaData, Table, Text, bindparam, cast, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from reft_serve.database.connection import Database
from reft_serve.database.migrations.schema import check_schema, migrate, revision_of
from reft_serve.errors import Conflict, DatabaseUnusable

__all__ = ["DumpedTable", "dump", "restore", "rows"]

_BATCH = 1000
_VERSIONS = "alembic_version"


@dataclass(frozen=True, slots=True)
class DumpedTable:
    """A table's file: how many rows it holds, and the sha256 of its bytes before compression."""

    rows: int
    sha256: str


async def dump(database: Database, folder: Path) -> tuple[str, dict[str, DumpedTable]]:
    """Write all tables into a folder that is there, and give (the schema's revision, its tables).

    Raises:
        DatabaseUnusable: the database cannot be reached, or must be migrated first.
    """
    await check_schema(database)
    options: dict[str, Any] = {} if database.is_sqlite else {"isolation_level": "REPEATABLE READ"}
    async with database.engine.connect() as connection:
        await connection.execution_options(**options)
        tables = await connection.run_sync(_tables)
        query = text(f"SELECT version_num FROM {_VERSIONS}")  # noqa: S608 - a constant
        revision = str(await connection.scalar(query))
        return revision, {table.name: await _write(connection, table, folder) for table in tables}


async def restore(
    database: Database, folder: Path, revision: str, tables: Mapping[str, DumpedTable]
) -> None:
    """Put all rows into a database that has none, and bring it to the schema of this version.

    Raises:
        Conflict: the database has tables of another schema, or rows.
        DatabaseUnusable: it cannot be reached, or the files are not what was dumped; no row was put
            in.
    """
    existing = await revision_of(database)
    if existing not in (None, revision):
        raise Conflict(
            f"the database has schema {existing}, the backup {revision}: restore into one without "
            "tables"
        )
    await migrate(database, revision)
    async with database.engine.execution_options(reft_writes=True).begin() as connection:
        created = await connection.run_sync(_tables)
        if {table.name for table in created} != set(tables):
            raise DatabaseUnusable(
                f"the backup's tables do not match schema {revision}: it is damaged"
            )
        for table in created:
            if await connection.scalar(select(func.count()).select_from(table)):
                raise Conflict(
                    f"the database is not empty (rows in {table.name}): restore into an empty one"
                )
        for table in created:
            await _read(connection, table, folder, tables[table.name])
    await migrate(database)


def rows(folder: Path, table: str) -> Iterator[dict[str, Any]]:
    """The rows of one dumped table, by column. Blocks."""
    with gzip.open(folder / f"{table}.jsonl.gz", "rb") as file:
        columns = json.loads(file.readline())
        for line in file:
            yield dict(zip(columns, json.loads(line), strict=True))


def _tables(connection: Connection) -> list[Table]:
    """The tables as they are in the database, those that others refer to first."""
    metadata = MetaData()
    metadata.reflect(connection)
    tables = [table for table in metadata.sorted_tables if table.name != _VERSIONS]
    for table in tables:
        for column in table.columns:
            if isinstance(column.type, JSON) and connection.dialect.name == "sqlite":
                # as it stands there: JSON's null is not the absence of a value
                column.type = Text()
    return tables


async def _write(connection: AsyncConnection, table: Table, folder: Path) -> DumpedTable:
    values = [
        cast(each, Text).label(each.name) if isinstance(each.type, JSON) else each
        for each in table.columns
    ]
    count = 0
    digest = hashlib.sha256()
    with gzip.open(folder / f"{table.name}.jsonl.gz", "wb") as file:
        _put(file, digest, [each.name for each in table.columns])
        rows = await connection.stream(select(*values).order_by(*table.primary_key.columns))
        async for batch in rows.partitions(_BATCH):
            await asyncio.to_thread(_put_all, file, digest, [list(row) for row in batch])
            count += len(batch)
    return DumpedTable(count, digest.hexdigest())


def _put_all(file: gzip.GzipFile, digest: Any, rows: Sequence[Sequence[Any]]) -> None:
    for row in rows:
        _put(file, digest, row)


def _put(file: gzip.GzipFile, digest: Any, row: Sequence[Any]) -> None:
    line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    digest.update(line)
    file.write(line)


async def _read(
    connection: AsyncConnection, table: Table, folder: Path, dumped: DumpedTable
) -> None:
    """Insert a table's rows; an exception undoes them all."""
    insert = table.insert()
    if connection.dialect.name == "postgresql":
        insert = insert.values(
            {
                each.name: cast(bindparam(each.name, type_=Text()), each.type)
                if isinstance(each.type, JSON)
                else bindparam(each.name, type_=each.type)
                for each in table.columns
            }
        )
    count = 0
    digest = hashlib.sha256()
    for batch in _batches(
        folder / f"{table.name}.jsonl.gz", digest, [each.name for each in table.columns]
    ):
        await connection.execute(insert, batch)
        count += len(batch)
    if (count, digest.hexdigest()) != (dumped.rows, dumped.sha256):
        raise DatabaseUnusable(
            f"the backup's table {table.name} does not match its checksum: it is damaged"
        )
    if connection.dialect.name == "postgresql":
        await _count_on(connection, table)


def _batches(path: Path, digest: Any, columns: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    try:
        with gzip.open(path, "rb") as file:
            head = file.readline()
            digest.update(head)
            if json.loads(head) != list(columns):
                raise DatabaseUnusable(
                    f"{path.name} does not match the columns of its table: the backup is damaged"
                )
            batch = []
            for line in file:
                digest.update(line)
                batch.append(dict(zip(columns, json.loads(line), strict=True)))
                if len(batch) == _BATCH:
                    yield batch
                    batch = []
            if batch:
                yield batch
    except (OSError, EOFError, ValueError) as exc:
        raise DatabaseUnusable(f"{path.name} cannot be read: the backup is damaged") from exc


async def _count_on(connection: AsyncConnection, table: Table) -> None:
    """Advance PostgreSQL's sequences past the restored ids."""
    for column in table.primary_key.columns:
        name = await connection.scalar(
            text("SELECT pg_get_serial_sequence(:table, :column)"),
            {"table": table.name, "column": column.name},
        )
        if name is not None:
            most = await connection.scalar(select(func.max(column)))
            if most is not None:
                await connection.execute(
                    text("SELECT setval(:name, :most)"), {"name": name, "most": most}
                )
