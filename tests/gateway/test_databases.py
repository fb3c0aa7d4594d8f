"""The gateway over each kind of database, and when the database goes away."""

from __future__ import annotations

import secrets
from pathlib import Path

import openai
import pytest

from tests.support.gateway.fake_worker import FakeWorker
from tests.support.gateway.harness import running, usage_of
from tests.support.gateway.uploads import upload
from tests.support.postgres import _execute
from tests.support.waiting import wait_for


def test_a_tenants_life_is_the_same_on_both(tmp_path: Path, url: str) -> None:
    with running(tmp_path, database=url) as (gateway, (engine,)):
        owner, guest = gateway.tenant("owner"), gateway.tenant("guest")
        for seed in (1, 2):
            assert owner.upload("birds", seed, alias="production").status_code == 201
        assert (
            owner.http.post("/v1/adapters/birds/aliases/production/rollback").json()["version"] == 1
        )
        assert owner.say("birds", max_tokens=3) == owner.say("birds@1", max_tokens=3)
        for name in ("owner/birds", "a\0b", "x" * 500):
            with pytest.raises(openai.NotFoundError):
                guest.say(name)
        owner.http.put(f"/v1/adapters/birds/shares/{guest.id}")
        assert guest.say("owner/birds", max_tokens=3)
        (counted,) = usage_of(owner, "model")[:1]
        assert counted["completion_tokens"] == 3
        assert owner.http.post("/v1/keys", json={"name": "a\0b"}).status_code == 400
        assert gateway.admin.delete("/v1/admin/tenants/owner").status_code == 200
        wait_for(lambda: not engine.adapters and not list((tmp_path / "store").glob("??/*")))


def test_a_jobs_life_is_the_same_on_both(tmp_path: Path, url: str) -> None:
    with running(tmp_path, database=url, upkeep_seconds=0.2) as (gateway, _):
        owner, guest = gateway.tenant("owner"), gateway.tenant("guest")
        fine_tuning, worker = owner.openai.fine_tuning, FakeWorker(gateway.settings)
        data = upload(owner)
        assert [file.id for file in owner.openai.files.list(limit=1, order="asc")] == [data.id]
        webhook = owner.openai.webhooks.create(
            name="w", url="https://localhost:1025/", event_types=["fine_tuning.job.succeeded"]
        )
        made = [
            fine_tuning.jobs.create(
                model="base", training_file=data.id, suffix="birds", metadata={'k"[]': str(k)}
            )
            for k in range(2)
        ]
        (found,) = fine_tuning.jobs.list(metadata={'k"[]': "1"})
        assert found.id == made[1].id
        assert fine_tuning.jobs.cancel(made[1].id).status == "cancelled"
        assert worker.succeed(worker.claim()) == "succeeded"
        done = fine_tuning.jobs.retrieve(made[0].id)
        assert len(list(fine_tuning.jobs.list_events(done.id, limit=2))) == 5
        after = fine_tuning.jobs.create(model="birds", training_file=data.id)
        assert after.model == done.fine_tuned_model
        assert worker.claim().parent_model == done.fine_tuned_model
        later, earlier = fine_tuning.jobs.checkpoints.list(done.id, limit=1)
        name = later.fine_tuned_model_checkpoint
        (given,) = fine_tuning.checkpoints.permissions.create(name, project_ids=[guest.id])
        assert [each.id for each in fine_tuning.checkpoints.permissions.list(name)] == [given.id]
        assert guest.say(name, max_tokens=3) == owner.say(name, max_tokens=3)
        with pytest.raises(openai.NotFoundError):
            guest.say(earlier.fine_tuned_model_checkpoint)
        assert [each.id for each in owner.openai.webhooks.list(limit=1)] == [webhook.id]
        wait_for(
            lambda: (
                'reft_webhook_deliveries_total{result="retried"}'
                in gateway.admin.get("/metrics").text
            ),
            10,
        )
        listed = gateway.admin.get(
            "/v1/admin/jobs", params={"tenant": "owner", "status": "succeeded"}
        ).json()["data"]
        assert [each["id"] for each in listed] == [done.id]
        gateway.admin.delete("/v1/admin/tenants/owner")
        wait_for(lambda: not any(path.is_file() for path in (tmp_path / "blobs").rglob("*")))


@pytest.mark.postgres
def test_connections_that_are_cut_in_the_middle_lose_no_record(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    server = request.getfixturevalue("postgres")
    name = f"cut_{secrets.token_hex(6)}"
    _execute(server, f"CREATE DATABASE {name}")
    with running(tmp_path, database=f"{server.rpartition('/')[0]}/{name}") as (gateway, (engine,)):
        tenant = gateway.tenant("acme")
        engine.token_seconds = 0.02
        for _ in range(4):
            stream = tenant.openai.completions.create(
                model="base", prompt="x", max_tokens=10, stream=True
            )
            next(stream)
            _execute(
                server,
                f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'",
            )
            assert len(list(stream)) == 9
        (counted,) = usage_of(tenant, "status")
        assert (counted["group"]["status"], counted["requests"]) == ("completed", 4)
        assert counted["completion_tokens"] == 40
