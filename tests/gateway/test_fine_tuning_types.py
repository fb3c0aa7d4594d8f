"""Files, jobs, permissions and webhook endpoints, strictly by the `openai` client's own types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai import Stream
from openai.types.fine_tuning import FineTuningJobEvent

from reft_serve.database.jobs.outcomes import Failed
from tests.support.gateway.fake_worker import FakeWorker
from tests.support.gateway.harness import Gateway, Tenant
from tests.support.gateway.strict import strict, strict_each
from tests.support.gateway.uploads import PAIR, jsonl, upload


@pytest.mark.parametrize("method", ["supervised", "dpo"])
def test_a_jobs_whole_life(
    gateway: Gateway, make_tenant: Callable[..., Tenant], method: str
) -> None:
    tenant, guest, worker = make_tenant(), make_tenant(), FakeWorker(gateway.settings)
    client, content = tenant.openai, jsonl(PAIR, PAIR) if method == "dpo" else jsonl()
    data = strict(upload(tenant, content, expires_after={"anchor": "created_at", "seconds": 3600}))
    assert strict(client.files.retrieve(data.id)) == strict_each(client.files.list())[0] == data
    jobs: Any = client.fine_tuning.jobs
    made = strict(
        jobs.create(
            model="base", training_file=data.id, validation_file=upload(tenant, content).id, seed=3, suffix="birds",
            method={"type": method, method: {"hyperparameters": {"n_epochs": 1}}}, metadata={"a": "b"},
            integrations=[{"type": "wandb", "wandb": {"project": "p"}}],
        )
    )  # fmt: skip
    # The client can pause a job, but its type of a job knows no such status: the one word here that is not OpenAI's.
    assert jobs.pause(made.id).status == "paused"
    assert strict(jobs.resume(made.id)).status == "queued"
    claim = worker.claim()
    worker.beat(claim, 1)
    worker.tell(claim, "step 1", {"train_loss": 1.5})
    assert strict(jobs.retrieve(made.id)).status == "running"
    worker.succeed(claim, 700)
    done = strict(jobs.retrieve(made.id))
    assert strict_each(jobs.list())[0] == done
    assert done.fine_tuned_model is not None
    listed = strict_each(jobs.list_events(made.id))
    followed = client.get(
        f"/fine_tuning/jobs/{made.id}/events", cast_to=object, stream=True,
        stream_cls=Stream[FineTuningJobEvent], options={"params": {"stream": "true"}},
    )  # fmt: skip
    assert [event.id for event in strict_each(followed)] == [event.id for event in listed[::-1]]
    assert {"message", "metrics"} >= {event.type for event in listed}
    points = strict_each(jobs.checkpoints.list(made.id))
    assert [point.fine_tuning_job_id for point in points] == [made.id] * 2
    assert strict(client.files.retrieve(done.result_files[0])).purpose == "fine-tune-results"

    permissions: Any = client.fine_tuning.checkpoints.permissions
    for name in (done.fine_tuned_model, points[0].fine_tuned_model_checkpoint, points[0].id):
        (given,) = strict_each(permissions.create(name, project_ids=[guest.id]))
        assert [each.id for each in strict_each(permissions.list(name))] == [given.id]
        assert (
            strict(permissions.delete(given.id, fine_tuned_model_checkpoint=name)).deleted is True
        )
    assert strict(client.files.delete(data.id)).deleted is True

    asked = {"model": "base", "training_file": upload(tenant, content).id}
    assert strict(jobs.cancel(strict(jobs.create(**asked)).id)).status == "cancelled"
    lost = strict(jobs.create(**asked))
    worker.finish(worker.claim(), Failed("data_invalid", "no"))
    assert strict(jobs.retrieve(lost.id)).error.code == "data_invalid"


def test_a_webhook_endpoints_whole_life(tenant: Tenant) -> None:
    webhooks: Any = tenant.openai.webhooks
    url = "https://93.184.215.14/x"  # never called
    made = strict(webhooks.create(name="x", url=url, event_types=["fine_tuning.job.failed"]))
    assert strict_each(webhooks.list())[0].id == strict(webhooks.retrieve(made.id)).id == made.id
    assert strict(webhooks.update(made.id, name="y")).name == "y"
    assert strict(webhooks.rotate_secret(made.id)).signing_secret != made.signing_secret
    assert strict(webhooks.delete(made.id)).deleted is True


def test_every_failure_is_the_sdks_own_exception(
    tenant: Tenant, make_tenant: Callable[..., Tenant]
) -> None:
    client, inference = tenant.openai, make_tenant(role="inference").openai
    data = upload(tenant).id
    files: Any = client.files
    jobs: Any = client.fine_tuning.jobs
    permissions: Any = client.fine_tuning.checkpoints.permissions
    made = jobs.create(model="base", training_file=data)
    jobs.cancel(made.id)
    running = jobs.create(model="base", training_file=data)
    for kind, call in (
        (openai.BadRequestError, lambda: files.create(file=("x", b"{}"), purpose="fine-tune")),
        (openai.BadRequestError, lambda: files.create(file=("x", jsonl()), purpose="batch")),
        (openai.BadRequestError, lambda: files.retrieve("nonsense")),
        (openai.NotFoundError, lambda: files.retrieve("file-0")),
        (openai.NotFoundError, lambda: files.content("file-0")),
        (openai.NotFoundError, lambda: files.delete("file-0")),
        (openai.ConflictError, lambda: files.delete(data)),
        (openai.NotFoundError, lambda: jobs.create(model="nobody", training_file=data)),
        (openai.NotFoundError, lambda: jobs.create(model="base", training_file="file-0")),
        (
            openai.BadRequestError,
            lambda: jobs.create(model="base", training_file=data, hyperparameters={"n_epochs": 0}),
        ),
        (openai.NotFoundError, lambda: jobs.retrieve("ftjob-0")),
        (openai.ConflictError, lambda: jobs.cancel(made.id)),
        (openai.ConflictError, lambda: jobs.resume(made.id)),
        (openai.NotFoundError, lambda: jobs.list_events("ftjob-0")),
        (openai.NotFoundError, lambda: jobs.checkpoints.list("ftjob-0")),
        (
            openai.NotFoundError,
            lambda: permissions.create("ft:base:x:y:z", project_ids=["tnt_" + "0" * 24]),
        ),
        (openai.PermissionDeniedError, inference.files.list),
        (openai.PermissionDeniedError, inference.fine_tuning.jobs.list),
        (openai.PermissionDeniedError, inference.webhooks.list),
        (openai.AuthenticationError, client.with_options(api_key="no").files.list),
    ):
        with pytest.raises(kind) as caught:
            call()
        body: Any = caught.value.body
        assert set(body) == {"message", "type", "param", "code"}
    jobs.cancel(running.id)
