"""What adapter servers are known to get wrong, each shown to be closed here (where another file does not show it yet)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from reft_serve.testing import FakeEngine
from tests.support.gateway.harness import Gateway, Tenant, adapter_files, running
from tests.support.waiting import wait_for


def test_unloading_frees_the_engine(engine: FakeEngine, tenant: Tenant) -> None:
    before = engine.counts["unload"]
    tenant.upload("birds", 101)
    held = set(engine.adapters)
    tenant.http.delete("/v1/adapters/birds")
    wait_for(
        lambda: engine.counts["unload"] == before + 1 and len(engine.adapters) == len(held) - 1
    )


def test_new_weights_under_an_old_name_never_meet_the_old_ones_cache(
    engine: FakeEngine, tenant: Tenant
) -> None:
    tenant.upload("birds", 102)
    tenant.say("birds")
    tenant.upload("birds", 103)
    tenant.say("birds")
    first, second = (request["model"] for request in engine.requests[-2:])
    assert first != second
    assert engine.adapters[first] != engine.adapters[second]


def test_a_version_is_read_from_disk_once_and_not_for_every_request(
    engine: FakeEngine, tenant: Tenant
) -> None:
    before = engine.counts["load"]
    tenant.upload("birds", 104)
    for _ in range(5):
        tenant.say("birds", max_tokens=1)
    assert engine.counts["load"] == before + 1


def test_an_adapter_that_fits_nothing_is_refused_and_not_served_as_the_base(tenant: Tenant) -> None:
    files = adapter_files()
    files["reft_model.safetensors"] = files["reft_model.safetensors"].replace(
        b"interventions.0.", b"interventions.9."
    )
    answer = tenant.http.post(
        "/v1/adapters", data={"name": "x"}, files=[("files", item) for item in files.items()]
    )
    assert answer.status_code == 400
    assert "belongs to no intervention" in answer.json()["error"]["message"]
    assert (
        tenant.http.post("/v1/completions", json={"model": "x", "prompt": "x"}).status_code == 404
    )


@pytest.mark.parametrize(
    "name",
    [
        "../store",
        "/etc",
        "..",
        "birds/../../x",
        "%2e%2e%2fx",
        "a\x00b",
        "reft-v-" + "0" * 32,
        "/models/fake-base",
        "' OR 1=1 --",
    ],
)
def test_a_models_name_is_never_a_path_an_engines_name_or_sql(
    engine: FakeEngine, tenant: Tenant, name: str
) -> None:
    before = engine.counts["requests"]
    answer = tenant.http.post("/v1/completions", json={"model": name, "prompt": "x"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert engine.counts["requests"] == before


def test_an_engines_own_name_for_a_version_is_nobodys_model(
    engine: FakeEngine, tenant: Tenant
) -> None:
    tenant.upload("birds")
    for name in engine.adapters:
        assert (
            tenant.http.post("/v1/completions", json={"model": name, "prompt": "x"}).status_code
            == 404
        )


@pytest.mark.parametrize(
    "path",
    ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/tokenize", "/detokenize", "/invocations", "/adapters", "/pause",
     "/scale_elastic_ep", "/sleep", "/collective_rpc", "/reset_prefix_cache", "/version", "/ping", "/load", "/server_info"],
)  # fmt: skip
def test_only_listed_routes_exist_even_for_an_admin(
    gateway: Gateway, engine: FakeEngine, path: str
) -> None:
    for method in ("GET", "POST"):
        answer = gateway.admin.request(method, path, json={})
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "not_found_error"


def test_no_answer_tells_a_server_path(
    gateway: Gateway, make_tenant: Callable[..., Tenant]
) -> None:
    tenant = make_tenant()
    tenant.upload("birds")
    for path in (
        "/v1/models",
        "/v1/models/birds",
        "/v1/adapters",
        "/v1/adapters/birds",
        "/v1/admin/engines",
        "/v1/audit",
    ):
        text = (gateway.admin if "admin" in path else tenant.http).get(path).text
        assert str(gateway.folder) not in text
        assert "fake-base" not in text


def test_a_secret_is_in_no_file_of_the_gateways(
    gateway: Gateway, make_tenant: Callable[..., Tenant]
) -> None:
    tenant = make_tenant()
    tenant.upload("birds")
    tenant.say("birds")
    kept = [path for path in gateway.folder.rglob("*") if path.is_file()]
    assert any(path.name.startswith("reft.db") for path in kept)
    for path in kept:
        assert tenant.key.encode() not in path.read_bytes(), path.name


def test_metrics_name_tenants_and_adapters_up_to_a_bound(tmp_path: Path) -> None:
    with running(tmp_path, named_labels=4) as (gateway, _):
        for k in range(5):
            tenant = gateway.tenant(f"bounded{k}")
            tenant.upload("birds", k + 1)
            tenant.say("birds", max_tokens=2)
        lines = gateway.admin.get("/metrics").text.splitlines()
        tokens = [
            line
            for line in lines
            if line.startswith("reft_tokens_total") and 'kind="completion"' in line
        ]
        named = [line for line in tokens if "bounded" in line]
        assert any(
            'adapter="bounded0:birds@1"' in line and 'tenant="bounded0"' in line for line in named
        )
        assert not any("bounded4" in line for line in tokens)
        assert any('tenant="other"' in line for line in tokens)
