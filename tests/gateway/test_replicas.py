"""Two gateways over two engines: what one gateway changes, the other serves, and nothing under way notices."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from reft_serve.testing import FakeEngine
from tests.support.gateway.harness import Gateway, Served, Tenant, running
from tests.support.waiting import wait_for


@pytest.fixture(scope="module")
def replicas(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Gateway, Gateway, list[FakeEngine]]]:
    folder = tmp_path_factory.mktemp("replicas")
    with running(folder, engines=2, gateway_name="one") as (one, engines):
        two = Gateway(folder, one.settings.engines, gateway_name="two")
        yield one, two, engines
        two.stop()


def at(gateway: Gateway, tenant: Tenant) -> Tenant:
    """The same tenant at another gateway."""
    return Tenant(gateway, tenant.id, tenant.name, tenant.key)


def version_of(tenant: Tenant, model: str) -> str:
    answer = tenant.http.post(
        "/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 1}
    )
    return str(answer.headers["x-reft-version"])


def test_a_new_version_is_served_within_two_seconds_by_every_gateway_and_engine(
    replicas: tuple[Gateway, Gateway, list[FakeEngine]],
) -> None:
    one, two, engines = replicas
    tenant = one.tenant("swift")
    both = [tenant, at(two, tenant)]
    tenant.upload("birds", 1)
    assert {version_of(each, "birds") for each in both} == {"birds@1"}
    begun = time.monotonic()
    tenant.upload("birds", 2)
    wait_for(lambda: {version_of(each, "birds") for each in both} == {"birds@2"}, 2)
    for k, engine in enumerate(engines):
        for gateway in (one, two):
            gateway.admin.post(f"/v1/admin/engines/engine-{1 - k}/drain")
        before = engine.counts["requests"]
        assert {version_of(each, "birds") for each in both} == {"birds@2"}
        assert engine.counts["requests"] == before + 2
        for gateway in (one, two):
            gateway.admin.post(f"/v1/admin/engines/engine-{1 - k}/resume")
    assert time.monotonic() - begun < 2


def test_a_promotion_reaches_the_other_gateway_and_no_request_under_way(
    replicas: tuple[Gateway, Gateway, list[FakeEngine]],
) -> None:
    one, two, engines = replicas
    tenant = one.tenant("promoted")
    other = at(two, tenant)
    tenant.upload("birds", 1, alias="production")
    tenant.upload("birds", 2, alias="canary")
    expected = {number: tenant.say(f"birds@{number}", max_tokens=30) for number in (1, 2)}
    for engine in engines:
        engine.token_seconds = 0.02
    streams = [each.openai.completions.create(model="birds", prompt="hello there", max_tokens=30, stream=True)
               for each in (tenant, other)]  # fmt: skip
    begun = [next(stream).choices[0].text for stream in streams]
    promoted = tenant.http.put("/v1/adapters/birds/aliases/production", json={"version": "canary"})
    assert promoted.json()["version"] == 2
    rest = ["".join(chunk.choices[0].text for chunk in stream) for stream in streams]
    for engine in engines:
        engine.token_seconds = 0.0
    assert [first + more for first, more in zip(begun, rest, strict=True)] == [expected[1]] * 2
    wait_for(lambda: version_of(other, "birds") == "birds@2", 2)
    assert tenant.http.post("/v1/adapters/birds/aliases/production/rollback").json()["version"] == 1
    wait_for(lambda: version_of(other, "birds") == "birds@1", 2)


def test_what_one_gateway_deletes_or_takes_back_is_gone_at_the_other_without_a_failure(
    replicas: tuple[Gateway, Gateway, list[FakeEngine]],
) -> None:
    one, two, _ = replicas
    tenant, guest = one.tenant("gone"), one.tenant("guest")
    here, there = at(two, tenant), at(two, guest)
    tenant.upload("birds", 1)
    tenant.http.put(f"/v1/adapters/birds/shares/{guest.id}")
    assert there.say("gone/birds")
    tenant.http.delete(f"/v1/adapters/birds/shares/{guest.id}")
    body = {"model": "gone/birds", "prompt": "x"}
    wait_for(lambda: there.http.post("/v1/completions", json=body).status_code == 404, 2)
    # each time the other gateway remembers a version that is being removed
    for seed in range(2, 6):
        tenant.upload("birds", seed)
        assert here.say(f"birds@{seed}")
        assert tenant.http.delete("/v1/adapters/birds/versions/" + str(seed)).status_code == 200
        deleted = time.monotonic()
        body = {"model": f"birds@{seed}", "prompt": "x"}
        status = 200
        while status == 200:
            begun = time.monotonic()
            status = here.http.post("/v1/completions", json=body).status_code
            assert status == 404 or begun - deleted < 2, "a later request may not find it"
        assert status == 404


def test_a_key_that_one_gateway_ends_is_dead_at_the_other(
    replicas: tuple[Gateway, Gateway, list[FakeEngine]],
) -> None:
    one, two, _ = replicas
    tenant = one.tenant("keys")
    made = tenant.http.post("/v1/keys", json={"role": "inference"}).json()
    client = two.http(made["secret"])
    assert client.get("/v1/models").status_code == 200
    tenant.http.delete(f"/v1/keys/{made['id']}")
    wait_for(lambda: client.get("/v1/models").status_code == 401, 2)


def test_a_version_that_is_deleted_while_a_request_waits_for_an_engine_is_a_404(
    tmp_path: Path,
) -> None:
    with running(tmp_path, in_flight_per_engine=1) as (gateway, (engine,)):
        tenant = gateway.tenant("acme")
        tenant.upload("birds", 1)
        engine.token_seconds = 0.05
        body = {"model": "base", "prompt": "x", "max_tokens": 20}
        first = threading.Thread(
            target=lambda: gateway.http(tenant.key).post("/v1/completions", json=body)
        )
        first.start()
        wait_for(lambda: engine.running == 1)
        caught: list[Exception] = []

        def ask() -> None:
            try:
                gateway.openai(tenant.key).completions.create(
                    model="birds", prompt="x", max_tokens=1
                )
            except openai.OpenAIError as exc:
                caught.append(exc)

        second = threading.Thread(target=ask)
        second.start()
        wait_for(lambda: "reft_queued_requests 1.0" in gateway.admin.get("/metrics").text)
        tenant.http.delete("/v1/adapters/birds")
        wait_for(lambda: not list((tmp_path / "store").glob("??/*")))
        first.join()
        second.join()
        assert isinstance(caught[0], openai.NotFoundError)


def test_engines_that_come_later_are_given_what_was_published_before(tmp_path: Path) -> None:
    engine = FakeEngine()
    with running(tmp_path) as (gateway, _):
        tenant = gateway.tenant("acme")
        tenant.upload("birds", 1)
        said = tenant.say("birds")
    later = Served(engine.app)
    gateway = Gateway(tmp_path, later.url)
    try:
        assert at(gateway, tenant).say("birds") == said
    finally:
        gateway.stop()
        later.stop()
