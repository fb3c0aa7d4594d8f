"""Limits counted in a real Redis: one count for several gateways, and what happens when it goes
away.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from limits.storage import storage_from_string

from reft_serve.gateway.accounting import concurrency
from reft_serve.testing import FakeEngine
from tests.support.gateway.harness import Gateway, Tenant, running
from tests.support.gateway.process import free_port

BODY = {"model": "base", "prompt": "x", "max_tokens": 1}


class Redis:
    """A server of our own on loopback, which keeps nothing."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"async+redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        command = [
            "redis-server",
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
        ]
        self._running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert time.monotonic() < deadline, "redis-server did not start"
                time.sleep(0.02)

    def stop(self) -> None:
        self._running.kill()
        self._running.wait()


@pytest.fixture
def redis() -> Iterator[Redis]:
    if shutil.which("redis-server") is None:
        pytest.skip("no redis-server is installed here (Debian's package of that name)")
    server = Redis()
    yield server
    server.stop()


def test_two_gateways_count_as_one_and_survive_the_end_of_what_they_count_in(
    tmp_path: Path, redis: Redis
) -> None:
    with running(tmp_path, gateway_name="one", limits_storage=redis.url) as (one, (engine,)):
        two = Gateway(tmp_path, one.settings.engines, gateway_name="two", limits_storage=redis.url)
        try:
            _requests_are_counted_together(one, two)
            _tokens_are_settled(one, two)
            _token_debts_are_carried_over(one)
            _requests_at_once_are_counted_together(one, two, engine)
            tenant = one.tenant("steady", limits={"tokens_per_minute": 1000})
            engine.token_seconds = 0.05
            stream = tenant.openai.completions.create(
                model="base", prompt="x", max_tokens=20, stream=True
            )
            next(stream)
            redis.stop()
            assert len(list(stream)) == 19  # what is under way is answered
            refused = tenant.http.post("/v1/completions", json=BODY)
            assert (refused.status_code, refused.json()["error"]["code"]) == (
                503,
                "database_unusable",
            )
            assert refused.headers["retry-after"]
            assert one.tenant("free").http.post("/v1/completions", json=BODY).status_code == 200
            redis.start()
            assert tenant.http.post("/v1/completions", json=BODY).status_code == 200
        finally:
            two.stop()


def at(gateway: Gateway, tenant: Tenant) -> Tenant:
    return Tenant(gateway, tenant.id, tenant.name, tenant.key)


def _requests_are_counted_together(one: Gateway, two: Gateway) -> None:
    tenant = one.tenant("few", limits={"requests_per_minute": 4})
    both = [tenant, at(two, tenant)] * 3
    assert [each.http.post("/v1/completions", json=BODY).status_code for each in both] == [
        200
    ] * 4 + [429] * 2


def _tokens_are_settled(one: Gateway, two: Gateway) -> None:
    tenant = one.tenant("sparing", limits={"tokens_per_minute": 100})
    first = tenant.http.post("/v1/completions", json=BODY | {"max_tokens": 60, "stop": ["nothing"]})
    assert first.status_code == 200
    second = at(two, tenant).http.post("/v1/completions", json=BODY)
    assert int(second.headers["x-ratelimit-remaining-tokens"]) == 100 - 61 - 1


def _token_debts_are_carried_over(gateway: Gateway) -> None:
    tenant = gateway.tenant("chatty", limits={"tokens_per_minute": 100})
    ask: dict[str, Any] = {
        "model": "base",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 90,
        "n": 1,
    }
    assert (
        tenant.http.post(
            "/v1/chat/completions", json=ask | {"messages": [*ask["messages"]] * 60}
        ).status_code
        == 429
    )
    words = " ".join(["x"] * 160)  # estimated at 79 tokens, and 160 to the engine
    assert (
        tenant.http.post(
            "/v1/completions", json=BODY | {"prompt": words, "max_tokens": 20}
        ).status_code
        == 200
    )
    assert (
        tenant.http.post(
            "/v1/completions", json=BODY | {"prompt": words, "max_tokens": 20}
        ).status_code
        == 429
    )
    refused = tenant.http.post("/v1/completions", json=BODY)
    assert refused.headers["x-ratelimit-remaining-tokens"] == "0"


def _requests_at_once_are_counted_together(one: Gateway, two: Gateway, engine: FakeEngine) -> None:
    tenant = one.tenant("narrow", limits={"concurrent_requests": 2})
    there = at(two, tenant)
    engine.token_seconds = 0.05
    streams = [
        each.openai.completions.create(model="base", prompt="x", max_tokens=40, stream=True)
        for each in (tenant, there)
    ]
    assert [
        each.http.post("/v1/completions", json=BODY).status_code for each in (tenant, there)
    ] == [429, 429]
    assert [len(list(stream)) for stream in streams] == [40, 40]
    engine.token_seconds = 0.0
    assert [
        each.http.post("/v1/completions", json=BODY).status_code for each in (tenant, there)
    ] == [200, 200]


def test_the_places_of_a_gateway_that_died_expire(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(concurrency, "LEASE_SECONDS", 1)

    async def scene() -> None:
        one, two = (concurrency.SharedConcurrency(_bridge(redis)) for _ in range(2))
        holder = ("tenant", "tnt")
        lease = await one.take(holder, 1)
        assert lease
        for _ in range(3):
            await asyncio.sleep(0.6)
            assert await two.take(holder, 1) is None  # it is renewed
        await one.close()
        await asyncio.sleep(1.2)
        other = await two.take(holder, 1)
        assert other
        ending = two.give_back(holder, other)
        assert ending is not None
        await ending
        assert await one.take(("tenant", "other"), 1)
        await two.close()
        await one.close()

    asyncio.run(scene())


def _bridge(redis: Redis) -> Any:
    storage: Any = storage_from_string(redis.url, implementation="redispy")
    return storage.bridge
