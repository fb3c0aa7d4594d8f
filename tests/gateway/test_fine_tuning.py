"""Fine-tuning over HTTP, by the `openai` client: asked for, followed, stopped, called, shared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from reft_serve.database.jobs.outcomes import Cancelled, Failed, Paused
from tests.support.gateway.fake_worker import CSV, FakeWorker
from tests.support.gateway.harness import Gateway, Tenant, running
from tests.support.gateway.uploads import create, upload
from tests.support.paths import ROOT
from tests.support.waiting import wait_for


def test_a_job_from_its_file_to_answers(
    gateway: Gateway, worker: FakeWorker, tenant: Tenant, make_tenant: Callable[..., Tenant]
) -> None:
    client = tenant.openai
    held_out = upload(tenant).id
    asked = {"n_epochs": 2, "rank": 4, "layers": [1, 2]}
    job = create(
        tenant, validation_file=held_out, suffix="birds", seed=7, metadata={"team": "blue"},
        method={"type": "supervised", "supervised": {"hyperparameters": asked}},
        integrations=[{"type": "wandb", "wandb": {"project": "p", "tags": ["a"]}}],
    )  # fmt: skip
    assert (job.object, job.status, job.model, job.seed, job.fine_tuned_model) == (
        "fine_tuning.job",
        "queued",
        "base",
        7,
        None,
    )
    assert (job.organization_id, job.metadata, job.validation_file, job.result_files) == (
        tenant.id,
        {"team": "blue"},
        held_out,
        [],
    )
    assert (job.error, job.finished_at, job.trained_tokens, job.estimated_finish) == (
        None,
        None,
        None,
        None,
    )
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (2, "auto")
    assert job.method is not None
    assert job.method.supervised is not None
    settings = job.method.supervised.hyperparameters
    assert settings is not None
    assert settings.model_extra is not None
    assert (settings.n_epochs, settings.model_extra["rank"], settings.model_extra["positions"]) == (
        2,
        4,
        "auto",
    )
    assert job.integrations is not None
    assert job.integrations[0].wandb.project == "p"

    mine = worker.claim()
    assert (mine.id, mine.hyperparameters, mine.method, mine.seed) == (
        job.id,
        asked,
        {"type": "supervised"},
        7,
    )
    worker.beat(mine, 2)
    running_ = client.fine_tuning.jobs.retrieve(job.id)
    assert (running_.status, running_.estimated_finish) == ("running", mine.created_ms // 1000 + 60)
    with pytest.raises(openai.ConflictError, match="uses this file"):
        client.files.delete(held_out)
    assert worker.succeed(mine, 500) == "succeeded"

    done = client.fine_tuning.jobs.retrieve(job.id)
    assert (done.status, done.trained_tokens, done.fine_tuned_model) == (
        "succeeded", 400, f"ft:base:{tenant.name}:birds:{job.id[-8:]}",
    )  # fmt: skip
    assert done.finished_at is not None
    assert client.files.content(done.result_files[0]).read() == CSV
    assert client.files.retrieve(done.result_files[0]).purpose == "fine-tune-results"
    points = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
    assert [
        (point.step_number, point.metrics.step, point.metrics.train_loss) for point in points
    ] == [
        (2, 2, 1.0),
        (1, 1, 2.0),
    ]
    names = [str(done.fine_tuned_model), *(point.fine_tuned_model_checkpoint for point in points)]
    assert len({tenant.say(name) for name in names}) == 3
    assert tenant.say("birds") == tenant.say(names[0])
    assert {*names, "birds"} <= {model.id for model in client.models.list()}
    other = make_tenant()
    for name in (*names, "birds"):
        with pytest.raises(openai.NotFoundError):
            other.say(name)
    client.files.delete(held_out)


@pytest.mark.parametrize(("what", "outcome"), [("cancel", Cancelled()), ("pause", Paused())])
def test_a_running_job_is_told_to_stop(
    worker: FakeWorker, tenant: Tenant, what: str, outcome: Any
) -> None:
    jobs = tenant.openai.fine_tuning.jobs
    job = create(tenant)
    mine = worker.claim()
    getattr(jobs, what)(job.id)
    assert worker.beat(mine) == what
    assert worker.finish(mine, outcome) == {"cancel": "cancelled", "pause": "paused"}[what]
    if what == "pause":
        assert jobs.retrieve(job.id).status == "paused"
        assert jobs.resume(job.id).status == "queued"
        assert worker.claim().attempts == 1
    actions = [entry["action"] for entry in tenant.http.get("/v1/audit").json()["data"]]
    assert f"job.{what}" in actions


def test_a_waiting_job_stops_at_once_and_an_ended_one_does_not(
    worker: FakeWorker, tenant: Tenant
) -> None:
    jobs = tenant.openai.fine_tuning.jobs
    job = create(tenant)
    assert jobs.pause(job.id).status == "paused"
    assert jobs.resume(job.id).status == "queued"
    cancelled = jobs.cancel(job.id)
    assert (cancelled.status, cancelled.finished_at is not None) == ("cancelled", True)
    for act in (jobs.cancel, jobs.pause, jobs.resume):
        with pytest.raises(openai.ConflictError, match="cancelled already"):
            act(job.id)


def test_a_failed_job_tells_its_owner_a_sentence_and_the_operator_the_rest(
    gateway: Gateway, worker: FakeWorker, tenant: Tenant
) -> None:
    job = create(tenant)
    for k in range(3):
        worker.release(worker.claim(), f"Traceback {k}: /srv/secret/path")
    failed = tenant.openai.fine_tuning.jobs.retrieve(job.id)
    assert (failed.status, failed.error and failed.error.code) == ("failed", "too_many_attempts")
    everything = failed.to_json() + json.dumps(
        [e.to_dict() for e in tenant.openai.fine_tuning.jobs.list_events(job.id)]
    )
    assert "secret" not in everything
    seen = gateway.admin.get(f"/v1/admin/jobs/{job.id}").json()
    assert (seen["traceback"], seen["attempts"], seen["tenant"]) == (
        "Traceback 2: /srv/secret/path",
        3,
        tenant.name,
    )
    listed = gateway.admin.get(
        "/v1/admin/jobs", params={"tenant": tenant.name, "status": "failed"}
    ).json()["data"]
    assert [each["id"] for each in listed] == [job.id]
    assert tenant.http.get("/v1/admin/jobs").status_code == 403

    other = create(tenant, training_file=job.training_file)
    worker.finish(
        worker.claim(),
        Failed("file_invalid", "the file changed after it was uploaded", "training_file"),
    )
    told = tenant.openai.fine_tuning.jobs.retrieve(other.id).error
    assert told is not None
    assert (told.code, told.message, told.param) == (
        "file_invalid",
        "the file changed after it was uploaded",
        "training_file",
    )


def test_jobs_are_listed_by_pages_and_by_metadata(tenant: Tenant) -> None:
    data = upload(tenant).id
    kinds: list[dict[str, str] | None] = [None, {"a": "1"}, {"a": ""}, {"a": "1", "b[c]": "ä &="}]
    made = [create(tenant, training_file=data, metadata=metadata).id for metadata in kinds]
    jobs = tenant.openai.fine_tuning.jobs
    page = jobs.list(limit=3)
    assert (len(page.data), page.has_more) == (3, True)
    assert [job.id for job in page] == made[::-1]
    for wanted, expected in (
        ({"a": "1"}, [3, 1]),
        ({"a": ""}, [2]),
        ({"b[c]": "ä &=", "a": "1"}, [3]),
        ({"z": "1"}, []),
    ):
        assert [job.id for job in jobs.list(metadata=wanted)] == [made[k] for k in expected], wanted
    assert [job.id for job in jobs.list(extra_query={"metadata": "null"})] == [made[0]]
    for nowhere in ({"a": "\0"}, {"\0": "1"}):
        assert list(jobs.list(metadata=nowhere)) == []
    for odd in ("", "a", "{}"):
        refused = tenant.http.get("/v1/fine_tuning/jobs", params={"metadata": odd})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "metadata")
    with pytest.raises(openai.NotFoundError):
        jobs.list(after="ftjob-0")


def test_only_an_admin_pushes_other_tenants_jobs_back(gateway: Gateway, tenant: Tenant) -> None:
    data = upload(tenant).id
    body = {"model": "base", "training_file": data}
    assert tenant.http.post("/v1/fine_tuning/jobs", json=body | {"priority": 1}).status_code == 403
    assert (
        tenant.http.post("/v1/fine_tuning/jobs", json=body | {"priority": -1}).json()["priority"]
        == -1
    )


def test_one_version_is_shared_and_taken_back(
    worker: FakeWorker, make_tenant: Callable[..., Tenant]
) -> None:
    owner, guest, third = make_tenant(), make_tenant(), make_tenant()
    job = create(owner, suffix="birds")
    worker.succeed(worker.claim(), 900)
    (latest, earlier) = owner.openai.fine_tuning.jobs.checkpoints.list(job.id)
    name = latest.fine_tuned_model_checkpoint
    permissions = owner.openai.fine_tuning.checkpoints.permissions
    made = permissions.create(name, project_ids=[guest.id, third.id, guest.id])
    assert {each.project_id for each in made} == {guest.id, third.id}
    assert guest.say(name) == owner.say(name)
    assert name in {model.id for model in guest.openai.models.list()}
    wider = owner.openai.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
    for beyond in (
        earlier.fine_tuned_model_checkpoint,
        wider,
        "birds",
        f"{owner.name}/birds",
        f"{owner.name}/birds@2",
    ):
        with pytest.raises(openai.NotFoundError):
            guest.say(str(beyond))
    page = permissions.list(name, limit=1, order="ascending")
    assert page.has_more
    assert len(list(page)) == 2
    (of_guest,) = permissions.list(latest.id, project_id=guest.id)
    with pytest.raises(openai.NotFoundError):
        guest.openai.fine_tuning.checkpoints.permissions.create(name, project_ids=[third.id])
    gone = permissions.delete(of_guest.id, fine_tuned_model_checkpoint=name)
    assert (gone.id, gone.deleted, gone.object) == (of_guest.id, True, "checkpoint.permission")
    with pytest.raises(openai.NotFoundError):
        guest.say(name)
    assert third.say(name)
    owner.gateway.admin.patch(f"/v1/admin/tenants/{owner.id}", json={"disabled": True})
    with pytest.raises(openai.NotFoundError):
        third.say(name)
    owner.gateway.admin.patch(f"/v1/admin/tenants/{owner.id}", json={"disabled": False})
    for bad, phrase in (([owner.id], "own tenant"), (["tnt_" + "0" * 24], "there is no tenant")):
        with pytest.raises(openai.APIStatusError, match=phrase):
            permissions.create(name, project_ids=bad)


def test_the_queue_is_in_the_metrics(tmp_path: Any) -> None:
    with running(tmp_path, upkeep_seconds=0.1) as (gateway, _):
        tenant, worker = gateway.tenant("acme"), FakeWorker(gateway.settings)
        data = upload(tenant).id
        for _ in range(3):
            create(tenant, training_file=data)
        worker.claim()

        def shown() -> bool:
            text = gateway.admin.get("/metrics").text
            return 'reft_jobs{status="running"} 1.0' in text and "reft_jobs_waiting 2.0" in text

        wait_for(shown)


def test_the_notebook_runs_from_its_first_cell_to_its_last(
    gateway: Gateway, worker: FakeWorker, tenant: Tenant, tmp_path: Path
) -> None:
    notebook = json.loads((ROOT / "examples" / "fine_tune.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    environment = os.environ | {
        "OPENAI_BASE_URL": f"{gateway.url}/v1",
        "OPENAI_API_KEY": tenant.key,
        "NO_PROXY": "*",
    }
    running_ = subprocess.Popen(
        [sys.executable, "-c", "\n".join(cells)],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: len(tenant.http.get("/v1/fine_tuning/jobs").json()["data"]) == 1, 30)
    worker.succeed(worker.claim())
    told, _ = running_.communicate(timeout=30)
    assert running_.returncode == 0, told
    assert "line 5: messages is empty" in told
    assert "succeeded ft:base:" in told
    assert CSV.decode() in told
    assert told.count(":ckpt-step-") == 2
