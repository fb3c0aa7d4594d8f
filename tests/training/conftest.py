"""A database and stores for jobs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from reft_serve.database.connection import Database
from tests.support.databases import new_sqlite
from tests.support.training.jobs import Place


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    url = f"sqlite:///{tmp_path / 'reft.db'}"
    await new_sqlite(url)
    database = Database(url)
    yield Place(tmp_path, database, url)
    await database.close()
