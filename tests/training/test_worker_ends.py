"""A worker ends within seconds, also if its database cannot be reached any more."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from reft_serve.database.connection import CLOSE_SECONDS, Database
from reft_serve.database.migrations.schema import migrate
from reft_serve.training.jobs.worker import running
from tests.support.postgres import postgres_server
from tests.support.training.jobs import Place

pytestmark = [pytest.mark.anyio, pytest.mark.postgres]


class Relay:
    """A TCP relay to a server, which can be frozen: connections stay open, and no byte passes."""

    def __init__(self, host: str, port: int) -> None:
        self._to = (host, port)
        self._passing = asyncio.Event()
        self._passing.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    def freeze(self) -> None:
        self._passing.clear()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Relay]:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._passing.is_set():
            await asyncio.sleep(60)
        there, here = await asyncio.open_connection(*self._to)
        for one, other in ((reader, here), (there, writer)):
            task = asyncio.create_task(self._pass_on(one, other))
            self._tasks.add(task)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while chunk := await reader.read(1 << 16):
                await self._passing.wait()
                writer.write(chunk)
                await writer.drain()
        await self._passing.wait()
        writer.close()


@contextlib.asynccontextmanager
async def _relayed() -> AsyncIterator[tuple[Relay, str]]:
    with postgres_server() as url:
        parts = urlsplit(url)
        async with Relay("127.0.0.1", parts.port or 5432).serving() as relay:
            yield relay, url.replace(f":{parts.port}/", f":{relay.port}/")


async def test_an_idle_worker_ends_though_its_database_is_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with _relayed() as (relay, url):
        database = Database(url)
        await migrate(database)
        settings = Place(tmp_path, database, url).settings()
        caplog.set_level(logging.INFO)
        async with running(settings) as worker:
            working = asyncio.create_task(worker.run())
            while worker.unready is not None:  # its nursery's first process takes a moment
                await asyncio.sleep(0.05)
            relay.freeze()
            await asyncio.sleep(0.3)  # so that it is in the middle of a look at the queue
            ended = time.monotonic()
            worker.end()
            await working
        assert time.monotonic() - ended < 10
        assert any("the worker starts" in record.message for record in caplog.records)
        await database.close()
        assert time.monotonic() - ended < 10 + 2 * CLOSE_SECONDS
