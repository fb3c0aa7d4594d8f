"""A database and stores for jobs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from reft_serve.database.connection import Database, migrate
from tests.support.training.jobs import Place


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    url = f"sqlite:///{tmp_path / 'reft.db'}"
    database = Database(url)
    await migrate(database)
    yield Place(tmp_path, database, url)
    await database.close()
