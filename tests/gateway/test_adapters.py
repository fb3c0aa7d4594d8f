"""Adapters over HTTP: what is taken, what is refused and how, versions, aliases, and what is left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from reft_serve.testing import FakeEngine
from tests.support.adapters.archives import tar_of, zip_of
from tests.support.gateway.harness import Gateway, Tenant, adapter_files, running
from tests.support.waiting import wait_for

Files = list[tuple[str, tuple[str, bytes]]]


def send(tenant: Tenant, name: str, *files: tuple[str, bytes]) -> Any:
    return tenant.http.post(
        "/v1/adapters", data={"name": name}, files=[("files", file) for file in files]
    )


def stored(gateway: Gateway) -> set[str]:
    return {path.name for path in (gateway.folder / "store").glob("??/*")}


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.tar", tar_of), ("a.tar.gz", lambda files: tar_of(files, "w:gz")), ("a.zip", zip_of),
        ("a.tgz", lambda files: tar_of({f"dir/{name}": content for name, content in files.items()}, "w:gz")),
    ],
)  # fmt: skip
def test_an_archive_is_the_same_adapter_as_its_files(
    tenant: Tenant, name: str, pack: Callable[[dict[str, bytes]], bytes]
) -> None:
    plain = tenant.upload("plain", 5).json()
    packed = send(tenant, "packed", (name, pack(adapter_files(5))))
    assert packed.status_code == 201, packed.text
    assert packed.json()["digest"] == plain["digest"]


def test_a_download_can_be_uploaded_again(tenant: Tenant) -> None:
    first = tenant.upload("birds", 3).json()
    content = tenant.http.get("/v1/adapters/birds/versions/1/content")
    assert content.headers["content-type"] == "application/x-tar"
    assert send(tenant, "again", ("x.tar", content.content)).json()["digest"] == first["digest"]


GOOD = adapter_files()
CONFIG, TENSORS = GOOD["reft_config.json"], GOOD["reft_model.safetensors"]


NARROW = adapter_files(width=4)["reft_model.safetensors"]


def changed(**changes: Any) -> bytes:
    return json.dumps(json.loads(CONFIG) | changes).encode()


BAD: dict[str, tuple[list[tuple[str, bytes]], str]] = {
    "no tensors": ([("reft_config.json", CONFIG)], "reft_model.safetensors is missing"),
    "another file": ([("evil.py", b"")], "not an adapter file"),
    "a pickle": ([("intkey_layer_1.bin", b"")], "not an adapter file"),
    "a path as name": ([("../reft_config.json", CONFIG), ("reft_model.safetensors", TENSORS)], "not an adapter file"),
    "twice": ([("reft_config.json", CONFIG), ("reft_config.json", CONFIG)], "appears twice"),
    "no JSON": ([("reft_config.json", b"{"), ("reft_model.safetensors", TENSORS)], "not JSON"),
    "a layer too high": (
        [("reft_config.json", changed(base_model={**json.loads(CONFIG)["base_model"], "num_hidden_layers": 1})),
         ("reft_model.safetensors", TENSORS)], "is at layer 1"),
    "half a LoRA": ([*GOOD.items(), ("adapter_config.json", b"{}")], "adapter_model.safetensors is missing"),
    "cut short": ([("reft_config.json", CONFIG), ("reft_model.safetensors", TENSORS[:-4])], "damaged"),
    "too long": ([("reft_config.json", CONFIG), ("reft_model.safetensors", TENSORS + b"1234")], "damaged"),
    "no header": ([("reft_config.json", CONFIG), ("reft_model.safetensors", b"\xff" * 100)], "damaged"),
    "wrong width": ([("reft_config.json", CONFIG), ("reft_model.safetensors", NARROW)],
                    "has shape (2, 4) and must have (2, 8)"),
    "wrong dtype": ([("reft_config.json", CONFIG), ("reft_model.safetensors", TENSORS.replace(b'"F32"', b'"I32"'))],
                    "is int32 and must be float32"),
    "other tensors": ([("reft_config.json", CONFIG), ("reft_model.safetensors", TENSORS.replace(b"ons.0.W", b"ons.1.W"))],
                      "belongs to no intervention"),
    "a damaged zip": ([("a.zip", b"PK\x03\x04 nonsense")], "cannot be read"),
    "a damaged tar": ([("a.tar.gz", b"\x1f\x8b nonsense")], "cannot be read"),
    "a tar that climbs": ([("a.tar", tar_of({"../../reft_config.json": CONFIG}))], "not an adapter file"),
    "a tar that climbs one": ([("a.tar", tar_of({"../reft_config.json": CONFIG}))], "not an adapter file"),
    "a tar from the root": ([("a.tar", tar_of({"/reft_config.json": CONFIG}))], "not an adapter file"),
    "an absolute tar": ([("a.tar", tar_of({"/etc/reft_config.json": CONFIG}))], "not an adapter file"),
    "a deep zip": ([("a.zip", zip_of({"a/b/reft_config.json": CONFIG}))], "not an adapter file"),
    "a zip with more": ([("a.zip", zip_of({**GOOD, "setup.py": b""}))], "not an adapter file"),
    "a link": ([("a.tar", tar_of({}, links={"reft_config.json": "/etc/passwd"}))], "link or a device"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_damage_gets_a_sentence_and_leaves_nothing(
    gateway: Gateway, engine: FakeEngine, tenant: Tenant, case: str
) -> None:
    files, phrase = BAD[case]
    before, asked = stored(gateway), engine.counts["load"]
    answer = send(tenant, "bad", *files)
    assert answer.status_code == 400, answer.text
    assert phrase in answer.json()["error"]["message"]
    assert stored(gateway) == before
    assert engine.counts["load"] == asked
    assert not list((gateway.folder / "store" / ".staging").iterdir())
    assert tenant.http.get("/v1/adapters/bad").status_code == 404


def test_a_bomb_stops_at_the_most_bytes_that_are_taken(tmp_path: Any) -> None:
    with running(tmp_path, max_upload_bytes=100_000) as (gateway, _):
        tenant = gateway.tenant("acme")
        bomb = zip_of({"reft_config.json": CONFIG, "reft_model.safetensors": b"0" * 50_000_000})
        assert len(bomb) < 100_000
        answer = send(tenant, "bomb", ("a.zip", bomb))
        assert answer.status_code == 413
        assert not list((tmp_path / "store" / ".staging").iterdir())


def test_what_the_engine_refuses_is_told_and_is_not_published(
    gateway: Gateway, engine: FakeEngine, tenant: Tenant
) -> None:
    engine.refuse_adapters = "intervention 0: R holds NaN or Inf"
    before = stored(gateway)
    answer = tenant.upload("birds", 77)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message == "adapter birds cannot be used: intervention 0: R holds NaN or Inf"
    wait_for(lambda: stored(gateway) == before)
    assert tenant.http.get("/v1/adapters").json()["data"] == []


def test_versions_aliases_and_the_way_back(tenant: Tenant) -> None:
    for seed in (1, 2, 3):
        tenant.upload("birds", seed)
    first, second, third = (tenant.say(f"birds@{k}") for k in (1, 2, 3))
    assert len({first, second, third}) == 3
    assert tenant.say("birds") == third
    url = "/v1/adapters/birds/aliases"
    for version in ("1", "2"):
        assert tenant.http.put(f"{url}/production", json={"version": version}).status_code == 200
    assert tenant.say("birds") == second == tenant.say("birds@production")
    tenant.http.put(f"{url}/canary", json={"version": "3", "share": 1.0})
    assert tenant.say("birds") == third
    tenant.http.put(f"{url}/production", json={"version": "canary"})
    assert tenant.http.delete(f"{url}/canary").status_code == 200
    assert tenant.say("birds") == third
    assert tenant.http.post(f"{url}/production/rollback").json()["version"] == 2
    assert tenant.say("birds") == second
    assert tenant.http.post(f"{url}/production/rollback").status_code == 409
    assert tenant.http.delete("/v1/adapters/birds/versions/2").status_code == 409
    names = [entry["action"] for entry in tenant.http.get("/v1/audit").json()["data"]]
    assert names[:3] == ["alias.rollback", "alias.delete", "alias.set"]


def test_a_canary_takes_about_its_share(tenant: Tenant) -> None:
    tenant.upload("birds", 1, alias="production")
    tenant.upload("birds", 2)
    tenant.http.put("/v1/adapters/birds/aliases/canary", json={"version": "2", "share": 0.5})
    versions = [
        tenant.http.post(
            "/v1/completions", json={"model": "birds", "prompt": "x", "max_tokens": 1}
        ).headers["x-reft-version"]
        for _ in range(60)
    ]
    assert 12 <= versions.count("birds@2") <= 48


def test_a_deleted_version_leaves_engine_and_store_once_nobody_uses_it(
    gateway: Gateway, engine: FakeEngine, make_tenant: Callable[..., Tenant]
) -> None:
    one, two = make_tenant(), make_tenant()
    digest = one.upload("birds", 42).json()["digest"]
    assert two.upload("mine", 42).json()["digest"] == digest
    held, unloaded = len(engine.adapters), engine.counts["unload"]
    one.http.delete("/v1/adapters/birds")
    other = one.upload("other", 43).json()["digest"]
    one.http.delete("/v1/adapters/other")
    wait_for(lambda: other not in stored(gateway))  # and by then what was deleted before it
    assert two.say("mine")
    assert digest in stored(gateway)
    assert (len(engine.adapters), engine.counts["unload"]) == (held, unloaded + 1)
    engine.token_seconds = 0.05
    with two.http.stream(
        "POST",
        "/v1/completions",
        json={"model": "mine", "prompt": "x", "max_tokens": 20, "stream": True},
    ) as under_way:
        lines = under_way.iter_lines()
        next(lines)
        assert two.http.delete("/v1/models/mine").status_code == 200
        assert (
            two.http.post("/v1/completions", json={"model": "mine", "prompt": "x"}).status_code
            == 404
        )
        rest = list(lines)
    assert rest[-2] == "data: [DONE]"
    wait_for(lambda: digest not in stored(gateway) and len(engine.adapters) == held - 1)


def test_the_same_name_uploaded_again_is_another_version_with_other_answers(tenant: Tenant) -> None:
    tenant.upload("birds", 1)
    first = tenant.say("birds")
    tenant.upload("birds", 2)
    assert tenant.say("birds") != first
    assert tenant.say("birds@1") == first


def test_room_is_limited_by_count_and_bytes(make_tenant: Callable[..., Tenant]) -> None:
    few = make_tenant(limits={"adapters": 1})
    assert few.upload("a").status_code == 201
    assert few.upload("b").status_code == 429
    assert few.upload("a", 2).status_code == 201
    small = make_tenant(limits={"storage_bytes": 1000})
    assert small.upload("a").status_code == 201
    assert small.upload("a", 2).status_code == 429


def test_limits_hold_for_uploads_at_once(
    gateway: Gateway, make_tenant: Callable[..., Tenant]
) -> None:
    tenant = make_tenant(limits={"adapters": 1, "storage_bytes": 1000})
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda k: tenant.upload(f"n{k}", seed=k + 1).status_code, range(8)))
    assert sorted(answers) == [201] + [429] * 7
    (kept,) = tenant.http.get("/v1/adapters").json()["data"]
    assert sum(version["bytes"] for version in kept["versions"]) <= 1000
    wait_for(lambda: not list((gateway.settings.store / ".staging").iterdir()))


def test_without_an_engine_nothing_is_published_unchecked(
    engine: FakeEngine, gateway: Gateway, tenant: Tenant
) -> None:
    engine.healthy = False
    wait_for(lambda: gateway.http(None).get("/health/ready").status_code == 503)
    answer = tenant.upload("birds")
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    engine.healthy = True
    wait_for(lambda: gateway.http(None).get("/health/ready").status_code == 200)
    assert tenant.http.get("/v1/adapters").json()["data"] == []
