"""Several engines: affinity, load, failure, drain, and what waits."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from reft_serve.testing import FakeEngine
from tests.support.gateway.harness import Gateway, Served, running, usage_of
from tests.support.waiting import wait_for

BODY = {"model": "base", "prompt": "x", "max_tokens": 1}


def shares(engines: list[FakeEngine]) -> list[int]:
    return [engine.counts["requests"] for engine in engines]


def test_requests_of_one_version_go_to_one_engine_and_many_versions_spread(tmp_path: Path) -> None:
    with running(tmp_path, engines=3) as (gateway, engines):
        tenant = gateway.tenant("acme")
        # which engine each calls home is chance: of 40 an engine lacks one in four million runs
        for k in range(40):
            tenant.upload(f"a{k}", k + 1)
        homes = []
        for k in range(40):
            before = shares(engines)
            for _ in range(3):
                tenant.say(f"a{k}", max_tokens=1)
            moved = [now - then for now, then in zip(shares(engines), before, strict=True)]
            assert sorted(moved) == [0, 0, 3]
            homes.append(moved.index(3))
        assert len(set(homes)) == 3


def test_a_busy_engine_lets_others_help(tmp_path: Path) -> None:
    with running(tmp_path, engines=3) as (gateway, engines):
        tenant = gateway.tenant("acme")
        for engine in engines:
            engine.token_seconds = 0.05
        with ThreadPoolExecutor(30) as pool:
            list(
                pool.map(
                    lambda _: tenant.http.post("/v1/completions", json=BODY | {"max_tokens": 20}),
                    range(30),
                )
            )
        assert min(shares(engines)) >= 3
        assert sum(shares(engines)) == 30


def test_a_new_version_is_in_every_engine_when_the_upload_returns(tmp_path: Path) -> None:
    with running(tmp_path, engines=3) as (gateway, engines):
        gateway.tenant("acme").upload("birds")
        assert [len(engine.adapters) for engine in engines] == [1, 1, 1]


def test_an_admin_reads_the_metrics_of_an_engine_whose_socket_is_private(tmp_path: Path) -> None:
    fake = FakeEngine()
    served = Served(fake.app)
    gateway = Gateway(tmp_path, {served.url: fake})
    try:
        found = gateway.admin.get("/v1/admin/engines/engine-0/metrics")
        assert found.text == "vllm:num_requests_running 0.0\n"
        assert found.headers["content-type"].startswith("text/plain")
        assert gateway.admin.get("/v1/admin/engines/engine-1/metrics").status_code == 404
        served.stop()
        assert gateway.admin.get("/v1/admin/engines/engine-0/metrics").status_code == 503
    finally:
        gateway.stop()


def test_a_version_that_one_engine_refuses_is_in_none(tmp_path: Path) -> None:
    with running(tmp_path, engines=2) as (gateway, engines):
        engines[1].refuse_adapters = "no"
        assert gateway.tenant("acme").upload("birds").status_code == 400
        assert [len(engine.adapters) for engine in engines] == [0, 0]


def test_an_engine_that_dies_costs_no_request_that_has_not_begun(tmp_path: Path) -> None:
    fakes = [FakeEngine(), FakeEngine()]
    served = [Served(fake.app) for fake in fakes]
    # No probe tells it: the requests themselves find out.
    engines = {each.url: fake for each, fake in zip(served, fakes, strict=True)}
    gateway = Gateway(tmp_path, engines, probe_seconds=60)
    try:
        tenant = gateway.tenant("acme")
        for k in range(6):
            tenant.upload(f"a{k}", k + 1)
        assert tenant.say("a0", max_tokens=1)
        home = shares(fakes).index(1)  # which it is depends on the ports that they have got
        served[home].stop()
        for k in range(6):
            assert tenant.say(f"a{k}", max_tokens=1)
        assert sum(shares(fakes)) == 7
        healthy = [
            each["healthy"] for each in gateway.admin.get("/v1/admin/engines").json()["data"]
        ]
        assert healthy == [k != home for k in range(2)]
        served[1 - home].stop()
        with pytest.raises(openai.InternalServerError) as caught:
            tenant.say("base")
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"]
        assert {each["group"]["status"] for each in usage_of(tenant, "status")} == {
            "completed",
            "failed",
        }
    finally:
        gateway.stop()


def test_a_drained_engine_gets_nothing_new_and_finishes_what_it_has(tmp_path: Path) -> None:
    with running(tmp_path, engines=2) as (gateway, engines):
        tenant = gateway.tenant("acme")
        for engine in engines:
            engine.token_seconds = 0.02
        streaming = tenant.openai.completions.create(
            model="base", prompt="x", max_tokens=20, stream=True
        )
        next(streaming)
        busy = next(k for k, engine in enumerate(engines) if engine.running)
        gateway.admin.post(f"/v1/admin/engines/engine-{busy}/drain")
        before = shares(engines)[busy]
        for _ in range(4):
            tenant.say("base", max_tokens=1)
        assert shares(engines)[busy] == before
        assert len(list(streaming)) == 19
        gateway.admin.post(f"/v1/admin/engines/engine-{1 - busy}/drain")
        assert gateway.http(None).get("/health/ready").status_code == 503
        gateway.admin.post(f"/v1/admin/engines/engine-{busy}/resume")
        assert tenant.say("base", max_tokens=1)


def test_what_waits_too_long_is_told_when_to_come_back(tmp_path: Path) -> None:
    with running(tmp_path, in_flight_per_engine=1, queue_seconds=0.3) as (gateway, (engine,)):
        tenant = gateway.tenant("acme")
        engine.token_seconds = 0.05
        first = threading.Thread(
            target=lambda: tenant.http.post("/v1/completions", json=BODY | {"max_tokens": 30})
        )
        first.start()
        wait_for(lambda: engine.running == 1)
        answer = gateway.http(tenant.key).post("/v1/completions", json=BODY)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "overloaded"
        assert answer.headers["retry-after"]
        first.join()
        assert tenant.http.post("/v1/completions", json=BODY).status_code == 200


def test_who_leaves_the_queue_takes_no_place_with_it(tmp_path: Path) -> None:
    with running(tmp_path, in_flight_per_engine=1) as (gateway, (engine,)):
        tenant = gateway.tenant("acme")
        engine.token_seconds = 0.05
        first = threading.Thread(
            target=lambda: tenant.http.post("/v1/completions", json=BODY | {"max_tokens": 20})
        )
        first.start()
        wait_for(lambda: engine.running == 1)
        for _ in range(5):
            with gateway.http(tenant.key) as client, pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=BODY, timeout=0.05)
        first.join()
        engine.token_seconds = 0.0
        assert tenant.http.post("/v1/completions", json=BODY).status_code == 200
        wait_for(lambda: gateway.admin.get("/v1/admin/engines").json()["data"][0]["in_flight"] == 0)
        assert engine.counts["requests"] == 2


def test_a_request_may_not_take_for_ever(tmp_path: Path) -> None:
    with running(tmp_path, request_seconds=0.5) as (gateway, (engine,)):
        tenant = gateway.tenant("acme")
        engine.token_seconds = 0.1
        with pytest.raises(openai.InternalServerError):
            tenant.say("base", max_tokens=50)
        stream = tenant.openai.completions.create(
            model="base", prompt="x", max_tokens=50, stream=True
        )
        with pytest.raises(openai.APIError, match="timed out"):
            list(stream)
        wait_for(lambda: engine.running == 0)
