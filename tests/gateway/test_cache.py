"""What a gateway remembers of keys and names, for an hour here, ends with the act that takes it
away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.gateway.harness import Gateway, Tenant, running

Act = Callable[[Gateway, Tenant, Tenant, str], object]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running(tmp_path_factory.mktemp("gateway"), cache_seconds=3600.0) as (found, _):
        yield found


@pytest.fixture
def owner(make_tenant: Callable[..., Tenant]) -> Tenant:
    """Whose birds have two versions, the first one in production."""
    tenant = make_tenant()
    tenant.upload("birds", 1, alias="production")
    tenant.upload("birds", 2)
    return tenant


def status(tenant: Tenant, model: str) -> int:
    return tenant.http.post(
        "/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 1}
    ).status_code


def version_of(tenant: Tenant, model: str) -> str:
    answer = tenant.http.post(
        "/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 1}
    )
    return answer.headers["x-reft-version"]


def disable(gateway: Gateway, owner: Tenant, *_: object) -> object:
    return gateway.admin.patch(
        f"/v1/admin/tenants/{owner.id}", json={"disabled": True}
    ).raise_for_status()


def delete_tenant(gateway: Gateway, owner: Tenant, *_: object) -> object:
    return gateway.admin.delete(f"/v1/admin/tenants/{owner.id}").raise_for_status()


def unshare(_: Gateway, owner: Tenant, guest: Tenant, __: str) -> object:
    return owner.http.delete(f"/v1/adapters/birds/shares/{guest.id}").raise_for_status()


def delete_adapter(_: Gateway, owner: Tenant, *__: object) -> object:
    return owner.http.delete("/v1/adapters/birds").raise_for_status()


def delete_model(_: Gateway, owner: Tenant, *__: object) -> object:
    return owner.http.delete("/v1/models/birds").raise_for_status()


@pytest.mark.parametrize("act", [unshare, disable, delete_adapter, delete_model, delete_tenant])
def test_a_shared_adapter_is_gone_at_once(
    gateway: Gateway, owner: Tenant, make_tenant: Callable[..., Tenant], act: Act
) -> None:
    guest = make_tenant()
    owner.http.put(f"/v1/adapters/birds/shares/{guest.id}").raise_for_status()
    names = [f"{owner.name}/birds", f"{owner.name}/birds@2", f"{owner.name}/birds@production"]
    assert [status(guest, name) for name in names] == [200] * 3
    act(gateway, owner, guest, "")
    assert [status(guest, name) for name in names] == [404] * 3


def take_back(_: Gateway, owner: Tenant, __: Tenant, model: str) -> object:
    url = f"/v1/fine_tuning/checkpoints/{model}/permissions"
    (given,) = owner.http.get(url).json()["data"]
    return owner.http.delete(f"{url}/{given['id']}").raise_for_status()


def delete_version(_: Gateway, owner: Tenant, *__: object) -> object:
    return owner.http.delete("/v1/adapters/birds/versions/2").raise_for_status()


@pytest.mark.parametrize("act", [take_back, disable, delete_version, delete_tenant])
def test_a_permitted_version_is_gone_at_once(
    gateway: Gateway, owner: Tenant, make_tenant: Callable[..., Tenant], act: Act
) -> None:
    guest = make_tenant()
    model = owner.http.get("/v1/adapters/birds/versions/2").json()["model"]
    url = f"/v1/fine_tuning/checkpoints/{model}/permissions"
    owner.http.post(url, json={"project_ids": [guest.id]}).raise_for_status()
    assert status(guest, model) == 200
    act(gateway, owner, guest, model)
    assert status(guest, model) == 404


def test_what_was_not_there_is_there_once_it_is_given(
    owner: Tenant, make_tenant: Callable[..., Tenant]
) -> None:
    guest = make_tenant()
    model = owner.http.get("/v1/adapters/birds/versions/2").json()["model"]
    names = [f"{owner.name}/birds", model, "birds"]
    assert [status(guest, name) for name in names] == [404] * 3
    owner.http.post(
        f"/v1/fine_tuning/checkpoints/{model}/permissions", json={"project_ids": [guest.id]}
    )
    assert [status(guest, name) for name in names] == [404, 200, 404]
    owner.http.put(f"/v1/adapters/birds/shares/{guest.id}")
    assert [status(guest, name) for name in names] == [200, 200, 404]
    guest.upload("birds", 3)
    assert [status(guest, name) for name in names] == [200] * 3


def test_an_alias_that_moves_or_goes_takes_its_name_with_it(owner: Tenant) -> None:
    url = "/v1/adapters/birds/aliases/production"
    assert version_of(owner, "birds") == version_of(owner, "birds@production") == "birds@1"
    owner.http.put(url, json={"version": "2"}).raise_for_status()
    assert version_of(owner, "birds") == version_of(owner, "birds@production") == "birds@2"
    owner.http.post(f"{url}/rollback").raise_for_status()
    assert version_of(owner, "birds") == version_of(owner, "birds@production") == "birds@1"
    owner.http.delete(url).raise_for_status()
    assert (version_of(owner, "birds"), status(owner, "birds@production")) == ("birds@2", 404)


def test_a_key_dies_at_once(gateway: Gateway, owner: Tenant) -> None:
    made = [owner.http.post("/v1/keys", json={}).json() for _ in range(2)]
    clients = [gateway.http(key["secret"]) for key in made]
    for act in (
        lambda: owner.http.delete(f"/v1/keys/{made[0]['id']}"),
        lambda: owner.http.post(f"/v1/keys/{made[1]['id']}/rotate"),
    ):
        client = clients.pop(0)
        assert client.get("/v1/models").status_code == 200
        act().raise_for_status()
        assert client.get("/v1/models").status_code == 401
    assert owner.http.get("/v1/models").status_code == 200
    disable(gateway, owner)
    assert owner.http.get("/v1/models").status_code == 401


def test_new_limits_bind_at_once(gateway: Gateway, owner: Tenant) -> None:
    body = {"model": "base", "prompt": "x", "max_tokens": 2}
    assert owner.http.post("/v1/completions", json=body).status_code == 200
    gateway.admin.patch(
        f"/v1/admin/tenants/{owner.id}", json={"limits": {"output_tokens": 1}}
    ).raise_for_status()
    assert owner.http.post("/v1/completions", json=body).status_code == 400
