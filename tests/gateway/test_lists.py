"""Lists: by pages, in a fixed number of queries, and bounded for each tenant, on each database."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
from sqlalchemy import event

from tests.support.gateway.harness import Gateway, Tenant, running


@pytest.fixture
def gateway(tmp_path: Any, url: str) -> Iterator[Gateway]:
    with running(tmp_path, database=url) as (made, _):
        yield made


def statements_of(gateway: Gateway, tenant: Tenant, path: str) -> int:
    """How many statements an answer takes: the fewest of three tries, since the gateway asks for
    itself besides.
    """
    database, counts = gateway.served.app.state.services.database, []

    def note(*args: Any) -> None:
        counts[-1] += 1

    event.listen(database.engine.sync_engine, "before_cursor_execute", note)
    for _ in range(3):
        counts.append(0)
        assert tenant.http.get(path).status_code == 200
    event.remove(database.engine.sync_engine, "before_cursor_execute", note)
    return min(counts)


def items(tenant: Tenant, path: str, limit: int) -> list[Any]:
    return list(chain.from_iterable(pages(tenant, path, limit)))


def pages(tenant: Tenant, path: str, limit: int, key: str = "id") -> list[list[Any]]:
    found, after = [], {}
    while True:
        page = tenant.http.get(path, params={"limit": limit, **after}).json()
        found.append([each[key] for each in page["data"]])
        assert len(found[-1]) <= limit
        if not page["has_more"]:
            return found
        after = {"after": found[-1][-1]}


def test_lists_take_as_many_queries_for_many_as_for_one_and_come_by_pages(gateway: Gateway) -> None:
    tenant, other = gateway.tenant("acme"), gateway.tenant("other")
    assert tenant.upload("n0", alias="production").status_code == 201
    paths = (
        "/v1/models",
        "/v1/adapters",
        "/v1/keys",
        "/v1/files",
        "/v1/fine_tuning/jobs",
        "/v1/audit",
        "/v1/usage",
    )
    before = {path: statements_of(gateway, tenant, path) for path in paths}
    for k in range(1, 4):
        tenant.upload(f"n{k}", alias="production")
        tenant.upload(f"n{k}", seed=1)
        tenant.http.put(f"/v1/adapters/n{k}/shares/{other.id}").raise_for_status()
        tenant.http.post("/v1/keys", json={}).raise_for_status()
    assert {path: statements_of(gateway, tenant, path) for path in paths} == before
    assert max(before.values()) <= 5  # BEGIN is one

    whole = tenant.http.get("/v1/models").json()
    assert not whole["has_more"]
    names = [each["id"] for each in whole["data"]]
    assert names[:3] == ["base", "n0", "n0@production"]
    assert len(names) == 1 + 4 * 2 + 7
    assert [model.id for model in tenant.openai.models.list()] == names
    theirs = [each["id"] for each in other.http.get("/v1/models").json()["data"]]
    assert theirs == [
        "base",
        *(f"acme/n{k}{part}" for k in range(1, 4) for part in ("", "@production")),
    ]
    for limit in (1, 3, 16):
        assert items(tenant, "/v1/models", limit) == names
        assert items(other, "/v1/models", limit) == theirs
    assert other.http.get("/v1/models", params={"after": "n0"}).status_code == 404

    assert [len(page) for page in pages(tenant, "/v1/adapters", 3)] == [3, 1]
    assert len(set(items(tenant, "/v1/keys", 3))) == 4
    assert pages(tenant, "/v1/adapters/n1/versions", 1, "version") == [[2], [1]]
    admin = gateway.admin.get("/v1/admin/tenants", params={"limit": 2}).json()
    assert admin["has_more"]
    rest = gateway.admin.get(
        "/v1/admin/tenants", params={"limit": 2, "after": admin["data"][-1]["id"]}
    ).json()
    assert [each["name"] for each in (*admin["data"], *rest["data"])] == [
        "acme",
        "operator",
        "other",
    ]


def test_keys_are_limited_and_ended_ones_are_not_kept_for_ever(
    gateway: Gateway, monkeypatch: Any
) -> None:
    monkeypatch.setattr("reft_serve.database.keys.ENDED_KEYS", 2)
    tenant = gateway.tenant("acme", limits={"keys": 3})
    made = [tenant.http.post("/v1/keys", json={}).json() for _ in range(2)]
    refused = tenant.http.post("/v1/keys", json={})
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert tenant.http.post(f"/v1/keys/{made[0]['id']}/rotate").status_code == 201
    assert (
        tenant.http.post(
            f"/v1/keys/{made[1]['id']}/rotate", params={"overlap_seconds": 60}
        ).status_code
        == 429
    )
    for _ in range(4):
        tenant.http.delete(f"/v1/keys/{made[1]['id']}").raise_for_status()
        made[1] = tenant.http.post("/v1/keys", json={}).json()
    listed = tenant.http.get("/v1/keys").json()["data"]
    assert sum(not key["revoked"] for key in listed) == 3
    assert sum(key["revoked"] for key in listed) == 2


def test_management_requests_are_limited_and_inference_is_not(gateway: Gateway) -> None:
    tenant, other = (
        gateway.tenant("acme", limits={"management_requests_per_minute": 5}),
        gateway.tenant("other"),
    )
    answers = [tenant.http.get(path).status_code for path in ("/v1/models", "/v1/keys") * 4]
    assert answers == [200] * 5 + [429] * 3
    assert tenant.say("base", max_tokens=1)
    assert other.http.get("/v1/models").status_code == 200
    key = other.http.post(
        "/v1/keys", json={"limits": {"management_requests_per_minute": 2}}
    ).json()["secret"]
    narrow = gateway.http(key)
    assert [narrow.get("/v1/models").status_code for _ in range(3)] == [200, 200, 429]
    assert other.http.get("/v1/models").status_code == 200
