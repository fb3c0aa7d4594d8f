"""How a gateway process leaves, and that it does not begin on a database that is not ready for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from reft_serve.testing import FakeEngine
from tests.support.gateway.harness import Gateway, Served
from tests.support.gateway.process import free_port, process
from tests.support.waiting import wait_for

BODY = {"model": "base", "prompt": "x", "max_tokens": 2}


@pytest.fixture
def behind() -> Iterator[tuple[FakeEngine, str]]:
    engine = FakeEngine()
    server = Served(engine.app)
    yield engine, server.url
    server.stop()


def test_it_says_that_it_leaves_serves_on_and_finishes_what_it_has_begun(
    tmp_path: Path, behind: tuple[FakeEngine, str]
) -> None:
    engine, engine_url = behind
    engine.token_seconds = 0.05
    prepared = Gateway(tmp_path, engine_url)
    prepared.stop()
    with (
        process(tmp_path, engine_url, REFT_NOTICE_SECONDS="1") as (running, url),
        httpx.Client(
            base_url=url, trust_env=False, headers={"authorization": f"Bearer {prepared.admin_key}"}
        ) as client,
    ):
        body = BODY | {"max_tokens": 50, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as streaming:
            events = streaming.iter_text()
            next(events)
            running.send_signal(signal.SIGTERM)
            wait_for(lambda: client.get("/health/ready").status_code == 503)
            during = client.post("/v1/completions", json=BODY)
            assert (during.status_code, during.headers["connection"]) == (200, "close")
            assert client.get("/health/live").status_code == 200
            assert "".join(events).endswith("data: [DONE]\n\n")  # it takes 2.5 s, and the notice 1
        assert running.wait(10) == -signal.SIGTERM


def test_what_an_engine_gives_up_as_it_ends_is_no_answer(
    tmp_path: Path, behind: tuple[FakeEngine, str]
) -> None:
    """Where vLLM says 200 and finish_reason "abort", a caller would take that for a short answer."""
    engine, engine_url = behind
    engine.token_seconds = 0.02
    gateway = Gateway(tmp_path, engine_url)
    try:
        with gateway.http(gateway.admin_key) as client:
            body = BODY | {"max_tokens": 30, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as streaming:
                events = streaming.iter_text()
                next(events)
                engine.ending = True
                rest = "".join(events)
            assert '"error"' in rest
            assert "abort" not in rest
            assert "[DONE]" not in rest
            for stream in (False, True):
                answer = client.post("/v1/completions", json=BODY | {"stream": stream})
                assert (answer.status_code, "retry-after" in answer.headers) == (503, True), (
                    answer.text
                )
            found = client.get("/v1/usage?group_by=status").json()["data"]
        assert {each["group"]["status"] for each in found} == {"failed"}
    finally:
        gateway.stop()


def test_a_second_signal_skips_the_notice(tmp_path: Path, behind: tuple[FakeEngine, str]) -> None:
    with process(tmp_path, behind[1], REFT_NOTICE_SECONDS="60") as (running, _):
        running.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert running.poll() is None
        running.send_signal(signal.SIGTERM)
        running.wait(10)


def test_without_leave_to_migrate_it_asks_for_a_migration(
    tmp_path: Path, behind: tuple[FakeEngine, str]
) -> None:
    settings = os.environ | {
        "REFT_DATABASE": f"sqlite:///{tmp_path}/reft.db", "REFT_STORE": str(tmp_path / "store"),
        "REFT_MIGRATE": "false", "REFT_ENGINES": behind[1],
    }  # fmt: skip
    run = [sys.executable, "-m", "reft_serve.cli.gateway", "--port", str(free_port())]
    ended = subprocess.run(
        run, env=settings, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 3
    assert "reft-serve admin migrate" in ended.stderr
