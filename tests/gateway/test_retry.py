"""Which requests are given again, and to whom: those of which no byte of an answer came, and not without end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import openai
import pytest

from reft_serve.gateway.fake_engine import FakeEngine
from tests.gateway.harness import Gateway, Served, Tenant
from tests.gateway.test_inference import take, usage_of


class HangingUp:
    """A way to an engine that closes the connection, instead of an answer, on the next `cuts` completions; with `breaks`,
    in the middle of an answer.
    """

    def __init__(self, port: int) -> None:
        self.cuts = self.seen = 0
        self.breaks = False
        self._port, self._loop = port, asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._through, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    async def _through(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        engine_reader, engine_writer = await asyncio.open_connection("127.0.0.1", self._port)
        back = asyncio.create_task(self._copy(engine_reader, writer))
        with suppress(ConnectionError):
            while given := await reader.read(1 << 16):
                if given.startswith(b"POST /v1/completions"):
                    self.seen += 1
                    self.cuts -= 1
                    if self.cuts >= 0:
                        break
                engine_writer.write(given)
        back.cancel()
        writer.close()
        engine_writer.close()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while given := await reader.read(1 << 16):
                writer.write(given)
                if self.breaks and b"data: " in given:
                    await asyncio.sleep(0.2)  # what has come is read before the end is seen
                    writer.close()
                    return

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)


@contextmanager
def hanging_up(folder: Path, engines: int) -> Iterator[tuple[Tenant, list[HangingUp]]]:
    """A tenant at a gateway over engines that can be made to hang up."""
    with ExitStack() as stack:
        ways = []
        for _ in range(engines):
            served = Served(FakeEngine(token_seconds=0.02).app)
            stack.callback(served.stop)
            ways.append(HangingUp(served.port))
            stack.callback(ways[-1].stop)
        gateway = Gateway(folder, ",".join(way.url for way in ways), probe_seconds=60)
        stack.callback(gateway.stop)
        yield gateway.tenant("acme"), ways


def test_a_connection_that_closes_as_it_is_used_again_costs_nobody_an_answer(tmp_path: Path) -> None:
    with hanging_up(tmp_path, 1) as (tenant, (way,)):
        said = tenant.say("base")
        way.cuts = 1
        assert tenant.say("base") == said
        assert way.seen == 3
        (counted,) = usage_of(tenant, "status")
        assert (counted["group"]["status"], counted["requests"]) == ("completed", 2)


def test_a_request_that_ends_every_engine_it_reaches_is_not_given_to_all_of_them(tmp_path: Path) -> None:
    with hanging_up(tmp_path, 4) as (tenant, ways):
        for way in ways:
            way.cuts = 1000
        with pytest.raises(openai.InternalServerError) as caught:
            tenant.say("base")
        assert caught.value.status_code == 503
        assert sorted(way.seen for way in ways) == [0, 0, 2, 2]
        (counted,) = usage_of(tenant, "status")
        assert (counted["group"]["status"], counted["requests"]) == ("failed", 1)


def test_an_answer_that_has_begun_is_never_begun_again(tmp_path: Path) -> None:
    with hanging_up(tmp_path, 2) as (tenant, ways):
        for way in ways:
            way.breaks = True
        pieces: list[Any] = []
        with pytest.raises(openai.APIError, match="in the middle of its answer"):
            take(tenant.openai.completions.create(model="base", prompt="x", stream=True, max_tokens=100), pieces)
        assert pieces
        assert sum(way.seen for way in ways) == 1
        (counted,) = usage_of(tenant, "status")
        assert (counted["group"]["status"], counted["completion_tokens"]) == ("failed", len(pieces))
