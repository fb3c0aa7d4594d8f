"""Usage on its way to the disk: what is written, and when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import select, text

from reft_serve.database.connection import Database
from reft_serve.database.models import Admission, Usage, now_ms
from reft_serve.database.usage import Ending, Opening
from reft_serve.gateway.accounting.ledger import Ledger
from tests.support.databases import new_sqlite

pytestmark = pytest.mark.anyio


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    url = f"sqlite:///{tmp_path / 'reft.db'}"
    await new_sqlite(url)
    opened = Database(url)
    yield opened
    await opened.close()


@pytest.fixture
async def ledger(database: Database) -> AsyncIterator[Ledger]:
    started = Ledger(database)
    started.start()
    yield started
    await started.close()


def opening(name: str) -> Opening:
    return Opening(name, "gateway", "tenant", "key", "chat", "base", None, now_ms())


def ending(begun: Opening, tokens: int = 3) -> Ending:
    return Ending(begun, "completed", 1, 0, tokens, now_ms())


async def admitted(database: Database) -> set[str]:
    async with database.reading() as session:
        return set((await session.scalars(select(Admission.request_id))).all())


async def counted(database: Database) -> dict[str, int]:
    async with database.reading() as session:
        return {
            row.request_id: row.completion_tokens
            for row in (await session.scalars(select(Usage))).all()
        }


async def test_a_stream_is_on_disk_before_it_may_be_seen_and_once_when_it_has_ended(
    database: Database, ledger: Ledger
) -> None:
    begun = opening("stream")
    await ledger.admit(begun)
    assert await admitted(database) == {"stream"}
    await ledger.settle(ending(begun))
    assert await admitted(database) == set()
    assert await counted(database) == {"stream": 3}


async def test_a_whole_answer_that_is_quick_is_written_once(
    database: Database, ledger: Ledger
) -> None:
    begun = [opening(f"quick {k}") for k in range(20)]
    for each in begun:
        ledger.note(each)
    await asyncio.gather(*(ledger.settle(ending(each)) for each in begun))
    assert len(await counted(database)) == 20
    await asyncio.sleep(0.4)  # as long as a note waits, and more
    assert await admitted(database) == set()


async def test_a_whole_answer_that_takes_long_is_known_of_while_it_does(
    database: Database, ledger: Ledger
) -> None:
    begun = opening("slow")
    ledger.note(begun)
    assert await admitted(database) == set()
    deadline = asyncio.get_running_loop().time() + 5
    while await admitted(database) != {"slow"}:
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.02)
    await ledger.settle(ending(begun))
    assert (await admitted(database), await counted(database)) == (set(), {"slow": 3})


async def test_a_batch_that_cannot_be_written_is_tried_again_and_counts_once(
    database: Database, ledger: Ledger
) -> None:
    begun = opening("patient")
    async with database.writing() as session:
        await session.execute(text("ALTER TABLE usage RENAME TO hidden"))
    first, last = ledger.admit(begun), ledger.settle(ending(begun))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(last), 0.3)
    async with database.writing() as session:
        await session.execute(text("ALTER TABLE hidden RENAME TO usage"))
    await asyncio.gather(first, last)
    assert (await admitted(database), await counted(database)) == (set(), {"patient": 3})


async def test_a_ledger_that_cannot_write_says_so_and_a_refused_request_is_not_billed(
    database: Database, ledger: Ledger
) -> None:
    begun = opening("refused")
    assert ledger.healthy
    async with database.writing() as session:
        await session.execute(text("ALTER TABLE usage RENAME TO hidden"))
    last = ledger.settle(ending(begun))
    deadline = asyncio.get_running_loop().time() + 5
    while ledger.healthy:
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.02)
    ledger.retract(Ending(begun, "failed", 0, 0, 0, now_ms()))
    async with database.writing() as session:
        await session.execute(text("ALTER TABLE hidden RENAME TO usage"))
    await last
    assert ledger.healthy
    assert await counted(database) == {"refused": 0}
