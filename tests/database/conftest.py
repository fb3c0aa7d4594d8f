"""An empty database of each kind, with and without its schema."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from reft_serve.database.connection import Database
from tests.support.databases import new_postgres, new_sqlite
from tests.support.postgres import BOTH


@pytest.fixture(params=BOTH)
async def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database with nothing in it."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'reft.db'}"
    return await new_postgres(request.getfixturevalue("postgres"), migrated=False)


@pytest.fixture(params=BOTH)
async def database(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    """A database with this version's schema."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'reft.db'}"
        await new_sqlite(url)
    else:
        url = await new_postgres(request.getfixturevalue("postgres"))
    opened = Database(url)
    yield opened
    await opened.close()
