"""Which requests are given again, and to whom: those of which no byte of an answer came, and not
without end.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import openai
import pytest

from reft_serve.testing import FakeEngine
from tests.support.gateway.harness import Gateway, Served, Tenant, take, usage_of
from tests.support.waiting import wait_for


class HangingUp:
    """A way to an engine that closes the connection, instead of an answer, on the next `cuts`
    completions; with `breaks`, in the middle of an answer. It ends for good on a completion that
    holds `POISON`.
    """

    def __init__(self, port: int) -> None:
        self.cuts = self.seen = 0
        self.breaks = self.ended = False
        self.poison_seconds = 0.0
        self._writers: set[asyncio.StreamWriter] = set()
        self._port, self._loop = port, asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(
            asyncio.start_server(self._through, "127.0.0.1", 0)
        )
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    async def _through(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        engine_reader, engine_writer = await asyncio.open_connection("127.0.0.1", self._port)
        back = asyncio.create_task(self._copy(engine_reader, writer))
        self._writers.add(writer)
        with suppress(ConnectionError):
            while given := await reader.read(1 << 16):
                if given.startswith(b"POST /v1/completions"):
                    self.seen += 1
                    self.cuts -= 1
                    if self.cuts >= 0:
                        break
                    if b"POISON" in given:
                        await asyncio.sleep(self.poison_seconds)
                        self._end()
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

    def _end(self) -> None:
        self.ended = True
        self._server.close()
        for writer in self._writers:
            writer.close()

    def end(self) -> None:
        """End as an engine does that is killed."""
        self._loop.call_soon_threadsafe(self._end)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)


@contextmanager
def hanging_up(
    folder: Path, engines: int, seconds: float = 0.02
) -> Iterator[tuple[Tenant, list[HangingUp]]]:
    """A tenant at a gateway over engines that can be made to hang up."""
    with ExitStack() as stack:
        ways = []
        for _ in range(engines):
            served = Served(FakeEngine(token_seconds=seconds).app)
            stack.callback(served.stop)
            ways.append(HangingUp(served.port))
            stack.callback(ways[-1].stop)
        gateway = Gateway(folder, ",".join(way.url for way in ways), probe_seconds=60)
        stack.callback(gateway.stop)
        yield gateway.tenant("acme"), ways


def test_a_connection_that_closes_as_it_is_used_again_costs_nobody_an_answer(
    tmp_path: Path,
) -> None:
    with hanging_up(tmp_path, 1) as (tenant, (way,)):
        said = tenant.say("base")
        way.cuts = 1
        assert tenant.say("base") == said
        assert way.seen == 3
        (counted,) = usage_of(tenant, "status")
        assert (counted["group"]["status"], counted["requests"]) == ("completed", 2)


def test_a_request_that_ends_every_engine_it_reaches_is_given_to_one_of_them(
    tmp_path: Path,
) -> None:
    with hanging_up(tmp_path, 4) as (tenant, ways):
        for way in ways:
            way.cuts = 1000
        with pytest.raises(openai.InternalServerError) as caught:
            tenant.say("base")
        assert (caught.value.status_code, caught.value.code) == (502, "engine_failed")
        assert sorted(way.seen for way in ways) == [0, 0, 0, 2]
        (counted,) = usage_of(tenant, "status")
        assert (counted["group"]["status"], counted["requests"]) == ("failed", 1)


def test_a_request_that_was_alone_in_an_engine_that_ended_is_not_accepted_again(
    tmp_path: Path,
) -> None:
    with hanging_up(tmp_path, 4) as (tenant, ways):
        body: dict[str, Any] = {"model": "base", "prompt": "POISON"}
        first = tenant.http.post("/v1/completions", json=body)
        assert (first.status_code, first.json()["error"]["code"]) == (502, "engine_failed")
        assert first.headers["x-should-retry"] == "false"
        assert "retry-after" not in first.headers
        for again in (
            body,
            body | {"stream": True},
            body | {"user": "me"},
            dict(reversed(body.items())),
        ):
            refused = tenant.http.post("/v1/completions", json=again)
            assert (refused.status_code, refused.json()["error"]["code"]) == (
                400,
                "request_quarantined",
            )
        with pytest.raises(openai.BadRequestError):  # with the client's own retries
            tenant.openai.with_options(max_retries=2).completions.create(**body)
        assert [way.ended for way in ways].count(True) == 1
        assert tenant.say("base")
        (entry,) = (
            e
            for e in tenant.http.get("/v1/audit").json()["data"]
            if e["action"] == "request.quarantine"
        )
        assert entry["details"] == {"endpoint": "completions", "model": "base"}


def test_the_openai_client_does_not_repeat_a_request_that_ended_an_engine(tmp_path: Path) -> None:
    with hanging_up(tmp_path, 4) as (tenant, ways):
        with pytest.raises(openai.InternalServerError):
            tenant.openai.with_options(max_retries=2).completions.create(
                model="base", prompt="POISON"
            )
        assert sum(way.seen for way in ways) == 1


def test_what_was_in_an_engine_with_others_is_delivered_once_more_if_it_is_plain(
    tmp_path: Path,
) -> None:
    with hanging_up(tmp_path, 3, seconds=0.2) as (tenant, ways), ThreadPoolExecutor(4) as pool:
        for number in (1, 2):
            tenant.gateway.admin.post(f"/v1/admin/engines/engine-{number}/drain")
        bodies: list[dict[str, Any]] = [
            {"model": "base", "prompt": f"p{k}", "max_tokens": 10} for k in range(4)
        ]
        bodies[3]["structured_outputs"] = {"choice": ["a", "b"]}
        asked = [pool.submit(tenant.http.post, "/v1/completions", json=body) for body in bodies]
        wait_for(lambda: ways[0].seen == 4)
        for number in (1, 2):
            tenant.gateway.admin.post(f"/v1/admin/engines/engine-{number}/resume")
        ways[0].end()
        assert [each.result().status_code for each in asked] == [200, 200, 200, 502]
        assert asked[3].result().headers["x-should-retry"] == "false"


def test_what_ends_a_second_engine_after_it_was_delivered_again_reaches_no_third(
    tmp_path: Path,
) -> None:
    with hanging_up(tmp_path, 4, seconds=0.2) as (tenant, ways), ThreadPoolExecutor(2) as pool:
        for number in (1, 2, 3):
            tenant.gateway.admin.post(f"/v1/admin/engines/engine-{number}/drain")
        ways[0].poison_seconds = 1.0
        innocent = pool.submit(tenant.say, "base", max_tokens=16)
        wait_for(lambda: ways[0].seen == 1)
        poison = pool.submit(
            tenant.http.post, "/v1/completions", json={"model": "base", "prompt": "POISON"}
        )
        wait_for(lambda: ways[0].seen == 2)
        for number in (1, 2, 3):
            tenant.gateway.admin.post(f"/v1/admin/engines/engine-{number}/resume")
        refused = poison.result()
        assert refused.status_code == 502
        assert [way.ended for way in ways].count(True) <= 2
        with suppress(openai.APIError):  # it may have been there both times
            innocent.result()


def test_an_answer_that_has_begun_is_never_begun_again(tmp_path: Path) -> None:
    with hanging_up(tmp_path, 2) as (tenant, ways):
        for way in ways:
            way.breaks = True
        pieces: list[Any] = []
        with pytest.raises(openai.APIError, match="in the middle of its response"):
            take(
                tenant.openai.completions.create(
                    model="base", prompt="x", stream=True, max_tokens=100
                ),
                pieces,
            )
        assert pieces
        assert sum(way.seen for way in ways) == 1
        (counted,) = usage_of(tenant, "status")
        assert (counted["group"]["status"], counted["completion_tokens"]) == ("failed", len(pieces))
