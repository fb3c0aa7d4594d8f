"""Limits counted in a real Redis: one count for several gateways, and what happens when it goes away."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway.harness import Gateway, Tenant, running
from tests.gateway.test_process import free_port

BODY = {"model": "base", "prompt": "x", "max_tokens": 1}


class Redis:
    """A server of our own on loopback, which keeps nothing."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"async+redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
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


def test_two_gateways_count_as_one_and_survive_the_end_of_what_they_count_in(tmp_path: Path, redis: Redis) -> None:
    with running(tmp_path, gateway_name="one", limits_storage=redis.url) as (one, (engine,)):
        two = Gateway(tmp_path, one.settings.engines, gateway_name="two", limits_storage=redis.url)
        try:
            _requests_are_counted_together(one, two)
            _tokens_are_settled(one, two)
            tenant = one.tenant("steady", limits={"tokens_per_minute": 1000})
            engine.token_seconds = 0.05
            stream = tenant.openai.completions.create(model="base", prompt="x", max_tokens=20, stream=True)
            next(stream)
            redis.stop()
            assert len(list(stream)) == 19  # what is under way is answered
            refused = tenant.http.post("/v1/completions", json=BODY)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "database_unusable")
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
    assert [each.http.post("/v1/completions", json=BODY).status_code for each in both] == [200] * 4 + [429] * 2


def _tokens_are_settled(one: Gateway, two: Gateway) -> None:
    tenant = one.tenant("sparing", limits={"tokens_per_minute": 100})
    first = tenant.http.post("/v1/completions", json=BODY | {"max_tokens": 60, "stop": ["nothing"]})
    assert first.status_code == 200
    second = at(two, tenant).http.post("/v1/completions", json=BODY)
    assert int(second.headers["x-ratelimit-remaining-tokens"]) == 100 - 61 - 1
