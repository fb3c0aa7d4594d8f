"""Insert what is not there yet, on either database."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Dialect
from sqlalchemy.dialects import postgresql, sqlite

from reft_serve.database.models import Base

__all__ = ["insert_new"]


def insert_new(dialect: Dialect, table: type[Base], unique: Sequence[str]) -> postgresql.Insert | sqlite.Insert:
    """The statement that inserts rows but for those whose `unique` columns are taken: what is there stays as it is."""
    if dialect.name == "postgresql":
        return postgresql.insert(table).on_conflict_do_nothing(index_elements=list(unique))
    return sqlite.insert(table).on_conflict_do_nothing(index_elements=list(unique))
