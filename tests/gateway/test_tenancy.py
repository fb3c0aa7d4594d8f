"""Keys, roles, tenants, limits: who may do what, and how much of it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from reft_serve.database.keys import MAKERS
from reft_serve.gateway.middleware import OPEN_PATHS
from reft_serve.testing import FakeEngine
from tests.support.gateway.harness import Gateway, Tenant, operations, running
from tests.support.waiting import wait_for


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer rk-wrong",
        "Basic abc",
        "bearer\txx",
        "Bearer é",
        "Bearer ' OR '1'='1",
        "Bearer %",
    ],
)
def test_no_path_passes_without_a_key_but_the_probes(gateway: Gateway, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    paths = [
        "/v1/load_lora_adapter",
        "/tokenize",
        "/adapters",
        "/invocations",
        "/docs",
        "/openapi.json",
        "/",
        "/nothing",
        "/metrics",
        "/scale_elastic_ep",
    ]
    with gateway.http(None) as client:
        for method, path in [*operations(gateway), *(("get", path) for path in paths)]:
            answer = client.request(method, path, headers=headers)  # type: ignore[arg-type]
            expected = 200 if path in OPEN_PATHS else 401
            assert answer.status_code == expected, (method, path)
            if expected == 401:
                assert answer.json()["error"]["code"] == "invalid_api_key"


def test_an_inference_key_only_infers(gateway: Gateway, make_tenant: Callable[..., Tenant]) -> None:
    tenant = make_tenant(role="inference")
    assert tenant.say("base")
    for method, path in operations(gateway):
        if (
            path in OPEN_PATHS
            or path.startswith(("/v1/models", "/v1/tenant"))
            or "inference" in _tags(gateway, method, path)
        ):
            continue
        assert_refused(tenant, method, path)
    assert tenant.http.delete("/v1/models/base").status_code == 403


def test_a_metrics_key_reads_metrics_and_nothing_else(
    gateway: Gateway, make_tenant: Callable[..., Tenant]
) -> None:
    reader = make_tenant(role="metrics")
    for path, metric in (
        ("/metrics", "reft_requests_total"),
        ("/v1/admin/engines/engine-0/metrics", "vllm:"),
    ):
        answer = reader.http.get(path)
        assert answer.status_code == 200
        assert metric in answer.text
    for method, path in operations(gateway):
        if path not in (
            *OPEN_PATHS,
            "/metrics",
            "/v1/admin/engines/{engine}/metrics",
            "/v1/tenant",
        ):
            assert_refused(reader, method, path)


def test_only_an_admin_makes_or_ends_a_metrics_key(gateway: Gateway, tenant: Tenant) -> None:
    for body in ({"role": "metrics"}, {"role": "owner", "scopes": ["metrics"]}):
        assert tenant.http.post("/v1/keys", json=body).status_code == 403
    made = gateway.admin.post(
        f"/v1/admin/tenants/{tenant.id}/keys", json={"role": "metrics"}
    ).json()
    assert made["scopes"] == ["metrics"]
    assert tenant.http.delete(f"/v1/keys/{made['id']}").status_code == 403
    assert tenant.http.post(f"/v1/keys/{made['id']}/rotate").status_code == 403
    assert gateway.http(made["secret"]).get("/metrics").status_code == 200
    narrow = gateway.admin.post("/v1/keys", json={"role": "admin", "scopes": ["admin"]}).json()[
        "secret"
    ]
    assert gateway.http(narrow).get("/metrics").status_code == 200


def assert_refused(tenant: Tenant, method: str, path: str) -> None:
    """The tenant's key may not do this; what reads a form before it asks who sent it may refuse the
    form instead.
    """
    values = {"name": "a", "alias": "b", "version": "1", "engine": "engine-0"}
    values |= {"tenant": "tnt_" + "0" * 24, "key": "key_" + "0" * 24}
    filled = re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), path)
    answer = tenant.http.request(
        method, filled, json={"name": "x", "version": "1", "role": "owner"}
    )
    assert answer.status_code in (400, 403), (method, path, answer.status_code)
    if answer.status_code == 400:
        assert "multipart" in str(
            tenant.gateway.served.app.openapi()["paths"][path][method]["requestBody"]
        )


def _tags(gateway: Gateway, method: str, path: str) -> list[str]:
    tags: list[str] = gateway.served.app.openapi()["paths"][path][method].get("tags", [])
    return tags


def test_an_owner_is_no_admin_and_makes_none(gateway: Gateway, tenant: Tenant) -> None:
    for method, path in operations(gateway):
        if path.startswith("/v1/admin"):
            filled = path.replace("{tenant}", tenant.id).replace("{engine}", "engine-0")
            body = {"name": "x", "role": "admin"}
            assert tenant.http.request(method, filled, json=body).status_code == 403, (method, path)
    assert tenant.http.post("/v1/keys", json={"role": "admin"}).status_code == 403
    assert tenant.http.get("/metrics").status_code == 403
    assert tenant.http.get("/v1/usage?all_tenants=true").status_code == 403
    assert tenant.http.get("/v1/audit?all_tenants=true").status_code == 403


def test_a_key_is_shown_once_and_dies_when_it_is_revoked(gateway: Gateway, tenant: Tenant) -> None:
    made = tenant.http.post("/v1/keys", json={"name": "ci", "role": "inference"}).json()
    client = gateway.openai(made["secret"])
    client.models.list()
    listed = tenant.http.get("/v1/keys").text
    assert made["id"] in listed
    assert made["secret"] not in listed
    assert made["secret"] not in tenant.http.get("/v1/audit").text
    assert tenant.http.delete(f"/v1/keys/{made['id']}").json()["revoked"] is True
    with pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_a_rotated_key_may_live_on_for_a_while(gateway: Gateway, tenant: Tenant) -> None:
    old = tenant.http.post("/v1/keys", json={"role": "inference"}).json()
    new = tenant.http.post(f"/v1/keys/{old['id']}/rotate?overlap_seconds=1").json()
    for each in (old, new):
        assert gateway.http(each["secret"]).get("/v1/models").status_code == 200
    time.sleep(1.1)
    assert gateway.http(old["secret"]).get("/v1/models").status_code == 401
    assert gateway.http(new["secret"]).get("/v1/models").status_code == 200


def test_scopes_narrow_a_role(gateway: Gateway, tenant: Tenant) -> None:
    key = tenant.http.post("/v1/keys", json={"role": "owner", "scopes": ["usage"]}).json()["secret"]
    client = gateway.http(key)
    assert client.get("/v1/usage").status_code == 200
    assert client.get("/v1/adapters").status_code == 403
    assert client.post("/v1/completions", json={"model": "base", "prompt": "x"}).status_code == 403


def test_a_narrow_key_comes_to_no_wider_one(gateway: Gateway, tenant: Tenant) -> None:
    wide = tenant.http.post("/v1/keys", json={"role": "owner"}).json()
    narrow = tenant.http.post(
        "/v1/keys", json={"role": "owner", "scopes": ["keys", "models"]}
    ).json()
    client = gateway.http(narrow["secret"])
    for body in (
        {"role": "owner"},
        {"role": "inference"},
        {"role": "owner", "scopes": ["keys", "adapters"]},
    ):
        assert client.post("/v1/keys", json=body).status_code == 403
    assert client.post(f"/v1/keys/{wide['id']}/rotate").status_code == 403
    made = client.post("/v1/keys", json={"role": "owner", "scopes": ["models"]})
    assert made.json()["scopes"] == ["models"]
    assert client.post(f"/v1/keys/{made.json()['id']}/rotate").status_code == 201
    assert client.post(f"/v1/keys/{narrow['id']}/rotate").status_code == 201


def test_a_key_makes_no_key_with_a_later_end_or_larger_limits(
    gateway: Gateway, tenant: Tenant
) -> None:
    end = int(time.time()) + 1000
    given = {"role": "owner", "expires_at": end, "limits": {"requests_per_minute": 5, "choices": 2}}
    maker = tenant.http.post("/v1/keys", json=given).json()
    client = gateway.http(maker["secret"])
    for beyond in (
        {"expires_at": end + 1},
        {"limits": {"requests_per_minute": 6}},
        {"limits": {"choices": 3}},
    ):
        assert client.post("/v1/keys", json=beyond).status_code == 403
    made = client.post("/v1/keys", json={"role": "owner", "limits": {"choices": 1}}).json()
    assert (
        made["expires_at"],
        made["limits"]["requests_per_minute"],
        made["limits"]["choices"],
    ) == (end, 5, 1)
    wide = tenant.http.post("/v1/keys", json={"role": "owner"}).json()
    assert client.post(f"/v1/keys/{wide['id']}/rotate").status_code == 403
    assert client.post(f"/v1/keys/{made['id']}/rotate").json()["expires_at"] == end
    rotated = client.post(f"/v1/keys/{maker['id']}/rotate").json()
    assert (rotated["expires_at"], rotated["limits"]) == (end, maker["limits"])
    grandchild = (
        gateway.http(rotated["secret"]).post("/v1/keys", json={"expires_at": end - 1}).json()
    )
    assert (grandchild["expires_at"], grandchild["limits"]["choices"]) == (end - 1, 2)


def test_a_key_the_keys_it_made_and_its_successors_are_counted_together(
    gateway: Gateway, tenant: Tenant
) -> None:
    body = {"model": "base", "prompt": "x", "max_tokens": 1}
    secret = tenant.http.post(
        "/v1/keys", json={"role": "owner", "limits": {"requests_per_minute": 4}}
    ).json()["secret"]
    used = []
    for _ in range(2):
        client = gateway.http(secret)
        used.append(client.post("/v1/completions", json=body).status_code)
        made = gateway.http(
            client.post("/v1/keys", json={"limits": {"requests_per_minute": 2}}).json()["secret"]
        )
        used.append(made.post("/v1/completions", json=body).status_code)
        own = client.get("/v1/keys").json()["data"]
        mine = next(key["id"] for key in reversed(own) if secret.startswith(key["prefix"]))
        secret = client.post(f"/v1/keys/{mine}/rotate").json()["secret"]
    assert used == [200] * 4
    assert gateway.http(secret).post("/v1/completions", json=body).status_code == 429
    assert tenant.http.post("/v1/completions", json=body).status_code == 200


def test_keys_with_limits_make_keys_a_bounded_number_of_times(
    gateway: Gateway, tenant: Tenant
) -> None:
    client, codes = tenant.http, []
    for _ in range(MAKERS + 2):
        made = client.post("/v1/keys", json={"role": "owner", "limits": {"choices": 4}})
        codes.append(made.status_code)
        if made.status_code == 201:
            client = gateway.http(made.json()["secret"])
    assert codes == [201] * (MAKERS + 1) + [403]


def test_an_admins_key_makes_no_admins_key_with_more_than_it_has(gateway: Gateway) -> None:
    url = "/v1/admin/tenants/operator/keys"
    end = int(time.time()) + 1000
    narrow = gateway.admin.post(
        url, json={"role": "admin", "scopes": ["admin", "keys"], "expires_at": end}
    ).json()
    client = gateway.http(narrow["secret"])
    assert client.post(url, json={"role": "admin"}).status_code == 403
    assert client.post(url, json={"role": "admin", "scopes": ["admin"]}).json()["expires_at"] == end


def test_a_key_that_is_over_is_not_rotated_into_a_new_one(gateway: Gateway, tenant: Tenant) -> None:
    for made in ({"role": "inference", "expires_at": int(time.time()) - 1}, {"role": "inference"}):
        key = tenant.http.post("/v1/keys", json=made).json()
        if "expires_at" not in made:
            tenant.http.delete(f"/v1/keys/{key['id']}")
        assert gateway.http(key["secret"]).get("/v1/models").status_code == 401
        assert tenant.http.post(f"/v1/keys/{key['id']}/rotate").status_code == 403


def test_a_key_expires_by_itself(gateway: Gateway, tenant: Tenant) -> None:
    soon = tenant.http.post(
        "/v1/keys", json={"role": "inference", "expires_at": int(time.time()) + 2}
    ).json()
    client = gateway.http(soon["secret"])
    assert client.get("/v1/models").status_code == 200
    time.sleep(max(0.0, soon["expires_at"] - time.time()) + 0.05)
    assert client.get("/v1/models").status_code == 401


def test_one_tenants_keys_and_audit_are_not_anothers(make_tenant: Callable[..., Tenant]) -> None:
    one, two = make_tenant(), make_tenant()
    key = one.http.post("/v1/keys", json={}).json()["id"]
    assert two.http.delete(f"/v1/keys/{key}").status_code == 404
    assert two.http.post(f"/v1/keys/{key}/rotate").status_code == 404
    assert key not in two.http.get("/v1/audit").text
    assert key not in two.http.get("/v1/keys").text


def test_a_disabled_tenant_is_shut_out_and_comes_back(gateway: Gateway, tenant: Tenant) -> None:
    url = f"/v1/admin/tenants/{tenant.id}"
    assert gateway.admin.patch(url, json={"disabled": True}).json()["disabled"] is True
    assert tenant.http.get("/v1/models").status_code == 401
    gateway.admin.patch(url, json={"disabled": False})
    assert tenant.http.get("/v1/models").status_code == 200
    assert (
        gateway.admin.patch("/v1/admin/tenants/operator", json={"disabled": True}).status_code
        == 409
    )
    assert gateway.admin.delete("/v1/admin/tenants/operator").status_code == 409


def test_a_deleted_tenant_leaves_nothing_but_its_usage(gateway: Gateway, tenant: Tenant) -> None:
    tenant.upload("birds", 90)
    tenant.say("birds", max_tokens=3)
    assert gateway.admin.delete(f"/v1/admin/tenants/{tenant.name}").json()["deleted"] is True
    assert tenant.http.get("/v1/models").status_code == 401
    found = gateway.admin.get("/v1/usage?all_tenants=true&group_by=tenant").json()["data"]
    assert {"tenant": tenant.id} in [each["group"] for each in found]


def test_requests_per_minute_are_limited_and_told(make_tenant: Callable[..., Tenant]) -> None:
    tenant = make_tenant(limits={"requests_per_minute": 3})
    body = {"model": "base", "prompt": "x", "max_tokens": 1}
    answers = [tenant.http.post("/v1/completions", json=body) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert [a.headers.get("x-ratelimit-remaining-requests") for a in answers[:3]] == ["2", "1", "0"]
    assert answers[0].headers["x-ratelimit-limit-requests"] == "3"
    assert int(answers[3].headers["retry-after"]) >= 1
    with pytest.raises(openai.RateLimitError):
        tenant.say("base")


def test_a_minutes_requests_may_not_all_come_at_once(make_tenant: Callable[..., Tenant]) -> None:
    tenant = make_tenant(limits={"requests_per_minute": 66})
    body = {"model": "base", "prompt": "x", "max_tokens": 1}
    answers = [tenant.http.post("/v1/completions", json=body) for _ in range(13)]
    assert [answer.status_code for answer in answers[:11]] == [200] * 11
    assert answers[10].headers["x-ratelimit-remaining-requests"] == "55"
    assert answers[12].status_code == 429
    assert "11 of them in 10 s" in answers[12].json()["error"]["message"]
    assert 1 <= int(answers[12].headers["retry-after"]) <= 10


def test_tokens_are_reserved_before_and_settled_after(
    engine: FakeEngine, make_tenant: Callable[..., Tenant]
) -> None:
    tenant = make_tenant(limits={"tokens_per_minute": 100})
    engine.default_tokens = 16
    body = {"model": "base", "prompt": "x", "max_tokens": 60}
    first = tenant.http.post("/v1/completions", json=body)
    assert first.headers["x-ratelimit-remaining-tokens"] == "40"
    # 1 prompt token and 60 generated ones were used: 39 are left, so 60 more cannot be reserved,
    # and 30 can.
    assert tenant.http.post("/v1/completions", json=body).status_code == 429
    assert tenant.http.post("/v1/completions", json=body | {"max_tokens": 30}).status_code == 200
    spare = make_tenant(limits={"tokens_per_minute": 100})
    long = "y" * 200  # estimated at 50 tokens, and one word to the engine
    for _ in range(3):
        assert (
            spare.http.post(
                "/v1/completions", json=body | {"prompt": long, "max_tokens": 1}
            ).status_code
            == 200
        )


def test_a_keys_own_limits_bind_it_besides_its_tenants(gateway: Gateway, tenant: Tenant) -> None:
    made = tenant.http.post("/v1/keys", json={"limits": {"requests_per_minute": 1}}).json()[
        "secret"
    ]
    limited = gateway.http(made)
    body = {"model": "base", "prompt": "x", "max_tokens": 1}
    assert [limited.post("/v1/completions", json=body).status_code for _ in range(2)] == [200, 429]
    assert tenant.http.post("/v1/completions", json=body).status_code == 200


def test_requests_at_once_are_limited_and_places_come_back(
    engine: FakeEngine, make_tenant: Callable[..., Tenant]
) -> None:
    tenant = make_tenant(limits={"concurrent_requests": 2})
    engine.token_seconds = 0.05
    body = {"model": "base", "prompt": "x", "max_tokens": 10}
    with ThreadPoolExecutor(4) as pool:
        codes = list(
            pool.map(lambda _: tenant.http.post("/v1/completions", json=body).status_code, range(4))
        )
    assert sorted(codes) == [200, 200, 429, 429]
    engine.token_seconds = 0.0
    assert tenant.http.post("/v1/completions", json=body).status_code == 200


def test_what_a_key_is_refused_costs_its_tenant_no_tokens(
    make_tenant: Callable[..., Tenant],
) -> None:
    tenant = make_tenant(limits={"tokens_per_minute": 1000})
    made = tenant.http.post("/v1/keys", json={"limits": {"requests_per_minute": 1}}).json()[
        "secret"
    ]
    limited = tenant.gateway.http(made)
    body = {"model": "base", "prompt": "x", "max_tokens": 200}
    assert [limited.post("/v1/completions", json=body).status_code for _ in range(9)] == [200] + [
        429
    ] * 8
    assert tenant.http.post("/v1/completions", json=body).status_code == 200


def test_choices_and_output_tokens_are_limited(make_tenant: Callable[..., Tenant]) -> None:
    tenant = make_tenant(limits={"choices": 2, "output_tokens": 10})
    for options in ({"n": 3}, {"max_tokens": 11}):
        with pytest.raises(openai.BadRequestError) as caught:
            tenant.say("base", **options)  # type: ignore[arg-type]
        assert caught.value.param == next(iter(options))


def test_a_tenant_that_floods_does_not_hold_up_another(tmp_path: Path) -> None:
    """One engine, four places, and 20 requests that wait for one before one request of another
    tenant: it is next in line.
    """
    with running(tmp_path, in_flight_per_engine=4) as (gateway, (engine,)):
        loud, quiet = gateway.tenant("loud"), gateway.tenant("quiet")
        engine.token_seconds = 0.2

        def ask(tenant: Tenant, tokens: int) -> None:
            body = {"model": "base", "prompt": tenant.name, "max_tokens": tokens}
            with gateway.http(tenant.key) as client:
                assert client.post("/v1/completions", json=body).status_code == 200

        def queued(count: int) -> bool:
            return f"reft_queued_requests {count}.0" in gateway.admin.get("/metrics").text

        with ThreadPoolExecutor(25) as pool:
            held = [pool.submit(ask, loud, 100) for _ in range(4)]
            wait_for(lambda: engine.running == 4)
            waiting = [pool.submit(ask, loud, 1) for _ in range(20)]
            wait_for(lambda: queued(20))
            waiting.append(pool.submit(ask, quiet, 1))
            wait_for(lambda: queued(21))
            engine.token_seconds = 0.0
            for each in (*held, *waiting):
                each.result(30)
        turns = [request["prompt"] for request in engine.requests[4:]]
        # It is first to get a place; the other three places are given out in the same moment.
        assert turns.index("quiet") < 4


def test_one_tenant_never_has_all_places_of_an_engine(tmp_path: Path) -> None:
    with running(tmp_path, in_flight_per_engine=8) as (gateway, (engine,)):
        loud, quiet = gateway.tenant("loud"), gateway.tenant("quiet")
        engine.token_seconds = 0.2
        body = {"model": "base", "prompt": "x", "max_tokens": 60}

        def ask(tenant: Tenant) -> None:
            with gateway.http(tenant.key) as client:
                assert client.post("/v1/completions", json=body).status_code == 200

        with ThreadPoolExecutor(15) as pool:
            asked = [pool.submit(ask, loud) for _ in range(14)]
            wait_for(lambda: engine.running == 7)
            time.sleep(0.1)
            assert engine.running == 7
            asked.append(pool.submit(ask, quiet))
            wait_for(lambda: engine.running == 8)
            engine.token_seconds = 0.0
            for each in asked:
                each.result(30)
