"""Why an engine cannot be used: found, logged once, and shown to the operator; and that its return is noticed soon."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse, PlainTextResponse

from reft_serve.errors import EngineUnavailable
from reft_serve.gateway.engines.engine import Engine
from reft_serve.testing import FakeEngine
from tests.support.gateway.harness import Gateway, Served
from tests.support.gateway.process import free_port, process
from tests.support.waiting import wait_for


class Guarded:
    """A fake engine that asks for a key as vLLM does, and whose list of models can be made nonsense."""

    def __init__(self, key: str) -> None:
        self.engine, self.key, self.nonsense = FakeEngine(), key, False
        self._app = self.engine.app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        given = dict(scope.get("headers", [])).get(b"authorization", b"").decode()
        if path.startswith("/v1") and given != f"Bearer {self.key}":
            await JSONResponse({"error": "Unauthorized"}, status_code=401)(scope, receive, send)
        elif path == "/v1/models" and self.nonsense:
            await PlainTextResponse("[]")(scope, receive, send)
        else:
            await self._app(scope, receive, send)


@pytest.fixture
def guarded() -> Iterator[tuple[Guarded, str]]:
    made = Guarded("right")
    served = Served(made)
    yield made, served.url
    served.stop()


def changes(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The sentences logged about engines, with the reason of each."""
    own = [each for each in caplog.records if each.name == "reft_serve.gateway.engines.state"]
    return [
        f"{each.levelname} {getattr(each, 'data', {}).get('reason', each.getMessage())}"
        for each in own
    ]


def test_each_change_is_logged_once_with_its_reason(
    guarded: tuple[Guarded, str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    fake, url = guarded

    async def watch() -> None:
        engine = Engine(0, url, "wrong")
        try:
            await engine.probe()
            await engine.probe()
            assert engine.state.trouble == "key_refused"
            assert "REFT_ENGINE_KEY" in (engine.state.sentence or "")
            fake.key = "wrong"
            fake.nonsense = True
            await engine.probe()
            fake.nonsense = False
            await engine.probe()
            await engine.probe()
            assert engine.healthy
            fake.engine.healthy = False
            await engine.probe()
            fake.engine.healthy = True
            await engine.probe()
        finally:
            await engine.close()

    asyncio.run(watch())
    assert changes(caplog) == [
        "WARNING key_refused", "WARNING unreadable", "INFO an engine is back", "WARNING unhealthy", "INFO an engine is back",
    ]  # fmt: skip
    assert "wrong" not in caplog.text


def test_addresses_without_an_engine_have_reasons_of_their_own(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def trouble(url: str) -> str | None:
        engine = Engine(0, url, None)
        try:
            await engine.probe()
            return engine.state.trouble
        finally:
            await engine.close()

    async def hanging_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async def broken() -> str | None:
        server = await asyncio.start_server(hanging_up, "127.0.0.1", 0)
        async with server:
            return await trouble(
                f"http://user:hidden@127.0.0.1:{server.sockets[0].getsockname()[1]}"
            )

    assert asyncio.run(trouble(f"http://127.0.0.1:{free_port()}")) == "unreachable"
    assert asyncio.run(trouble("unix:/nowhere/engine.sock")) == "unreachable"
    assert asyncio.run(trouble("http://engine.invalid:80")) == "unknown_host"
    assert asyncio.run(broken()) == "broken"
    assert "hidden" not in caplog.text


def test_an_engine_that_refuses_the_key_in_service_is_taken_out(
    tmp_path: Path, guarded: tuple[Guarded, str]
) -> None:
    fake, url = guarded
    gateway = Gateway(tmp_path, url, engine_key="right", probe_seconds=60)
    try:
        tenant = gateway.tenant("acme")
        assert tenant.say("base", max_tokens=1)
        (state,) = gateway.admin.get("/v1/admin/engines").json()["data"]
        assert (state["healthy"], state["reason"], state["message"]) == (True, None, None)
        fake.key = "another"
        answer = tenant.http.post(
            "/v1/completions", json={"model": "base", "prompt": "x", "max_tokens": 1}
        )
        assert answer.status_code == 503  # not the engine's 401: the caller's own key is right
        (state,) = gateway.admin.get("/v1/admin/engines").json()["data"]
        assert (state["healthy"], state["reason"]) == (False, "key_refused")
        assert "REFT_ENGINE_KEY" in state["message"]
        page = gateway.admin.get("/metrics").text
        assert 'reft_engine_unusable{engine="engine-0",reason="key_refused"} 1.0' in page
    finally:
        gateway.stop()


def test_an_engine_that_is_down_is_probed_seldom_and_its_return_is_noticed(tmp_path: Path) -> None:
    engine = FakeEngine(healthy=False)
    served = Served(engine.app)
    gateway = Gateway(tmp_path, served.url, probe_seconds=2)
    try:
        begun = time.monotonic()
        while time.monotonic() < begun + 8:
            time.sleep(0.1)
        assert engine.counts["health"] <= 27  # 4 a second would be 32
        engine.healthy = True
        begun = time.monotonic()
        wait_for(lambda: gateway.http(None).get("/health/ready").status_code == 200)
        assert time.monotonic() - begun < 4
    finally:
        gateway.stop()
        served.stop()


def test_loads_that_fail_leave_nothing_behind(guarded: tuple[Guarded, str], tmp_path: Path) -> None:
    _, url = guarded

    async def fail_often() -> int:
        engine = Engine(0, url, "wrong")
        try:
            for number in range(20):
                with pytest.raises(EngineUnavailable):
                    await engine.load(f"version-{number}", tmp_path)
            return len(engine._loading)
        finally:
            await engine.close()

    assert asyncio.run(fail_often()) == 0


def test_a_gateway_says_where_it_listens_and_which_engines_it_found(tmp_path: Path) -> None:
    served = Served(FakeEngine().app)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        silent = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with process(tmp_path, f"{served.url},{silent}", REFT_ENGINE_KEY="s-1") as (_, url):
            log = (tmp_path / "gateway.log").read_text()
    served.stop()
    assert f'"addresses": ["{url}"]' in log
    assert log.count("found an engine") == 1
    assert served.url in log
    assert log.count('"reason": "unreachable"') == 1
    assert silent in log
    assert "s-1" not in log
