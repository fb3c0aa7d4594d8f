"""An adapter, a job's suffix or an alias cannot have a name that means something else where a model
is named.
"""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path

import pytest
from sqlalchemy import update

from reft_serve.database.connection import Database
from reft_serve.database.models import Adapter
from reft_serve.database.names import RESERVED
from tests.support.gateway.harness import Gateway, Tenant, running

_NAMES = ["base", "BASE", "Base", "reft-v-" + "0" * 32, "Reft-V-x", *sorted(RESERVED)]


@pytest.mark.parametrize("name", _NAMES)
def test_an_upload_cannot_take_a_reserved_name(tenant: Tenant, name: str) -> None:
    answer = tenant.upload(name)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "name"
    assert [model["id"] for model in tenant.http.get("/v1/models").json()["data"]] == ["base"]


@pytest.mark.parametrize("name", ["Base", "reft-v-1", "production"])
def test_a_job_cannot_take_a_reserved_suffix(tenant: Tenant, name: str) -> None:
    rows = b"\n".join(json.dumps({"prompt": f"p{i}", "completion": "c"}).encode() for i in range(2))
    file = tenant.http.post(
        "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", io.BytesIO(rows))}
    ).json()["id"]
    answer = tenant.http.post(
        "/v1/fine_tuning/jobs", json={"model": "base", "training_file": file, "suffix": name}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "suffix"


def test_an_alias_cannot_be_the_base_models_name(tenant: Tenant) -> None:
    assert tenant.upload("birds", 3).status_code == 201
    at = "/v1/adapters/birds/aliases"
    assert tenant.http.put(f"{at}/base", json={"version": "1"}).json()["error"]["param"] == "alias"
    assert tenant.upload("birds", 4, alias="base").status_code == 400
    assert tenant.http.put(f"{at}/production", json={"version": "1"}).status_code == 200


def test_the_name_that_other_tenants_use_cannot_be_the_base_models(tmp_path: Path) -> None:
    with running(tmp_path, base_model="acme/Llama") as (gateway, _):
        acme = gateway.tenant("acme")
        assert acme.upload("llama").status_code == 400
        assert gateway.tenant("other").upload("llama", 2).status_code == 201
        assert acme.upload("base").status_code == 400, "the default public name stays reserved"


def test_an_adapter_that_has_such_a_name_already_can_be_read_and_deleted(
    gateway: Gateway, tenant: Tenant
) -> None:
    assert tenant.upload("older", 5).status_code == 201
    asyncio.run(_rename(gateway.settings.database, tenant.id, "older", "base"))
    assert tenant.http.get("/v1/adapters/base").json()["name"] == "base"
    assert tenant.upload("base", 6).status_code == 400
    assert tenant.http.delete("/v1/adapters/base").status_code == 200
    assert tenant.http.get("/v1/adapters").json()["data"] == []


async def _rename(url: str, tenant: str, old: str, new: str) -> None:
    database = Database(url)
    async with database.writing() as session:
        await session.execute(
            update(Adapter).where(Adapter.tenant_id == tenant, Adapter.name == old).values(name=new)
        )
    await database.close()
