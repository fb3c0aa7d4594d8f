"""Insert what is not there yet, on either database."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession

from reft_serve.database.models import Base

__all__ = ["insert_new"]


async def insert_new(
    session: AsyncSession, table: type[Base], rows: Sequence[dict[str, Any]], unique: Sequence[str]
) -> None:
    """Insert `rows` but for those whose `unique` columns are taken: what is there stays as it is."""
    dialect = session.get_bind().dialect.name
    insert = (postgresql if dialect == "postgresql" else sqlite).insert(table)
    await session.execute(insert.on_conflict_do_nothing(index_elements=list(unique)), list(rows))
