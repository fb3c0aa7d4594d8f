"""What a request for a job may say: settings, models, files, methods, limits; and what is refused, with its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.support.gateway.fake_worker import FakeWorker
from tests.support.gateway.harness import Tenant
from tests.support.gateway.uploads import PAIR, create, jsonl, upload


def supervised(**given: Any) -> dict[str, Any]:
    return {"method": {"type": "supervised", "supervised": {"hyperparameters": given}}}


REFUSED: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "no rank": (supervised(rank=0), '"auto" or a whole number from 1 to 1,024', "method.supervised.hyperparameters.rank"),
    "odd positions": (supervised(positions="f7;l7"), "fN+lN", "method.supervised.hyperparameters.positions"),
    "untied": (supervised(tied=False, positions="last"), "cannot be untied", "method.supervised.hyperparameters"),
    "unknown": (supervised(magic=1), "unknown field", "method.supervised.hyperparameters.magic"),
    "old rank": ({"hyperparameters": {"rank": "big"}}, "a whole number", "hyperparameters.rank"),
    "both": ({**supervised(rank=1), "hyperparameters": {"n_epochs": 1}}, "not in both", "hyperparameters"),
    "other method": ({"method": {"type": "reinforcement"}}, "'reinforcement' is not supported", "method.type"),
    "mixed": ({"method": {"type": "supervised", "dpo": {}}}, "it has settings of dpo", "method"),
    "dpo of chats": ({"method": {"type": "dpo"}}, "has chat rows, but method dpo learns from preference", "training_file"),
    "suffix": ({"suffix": "../x"}, "suffix", "suffix"),
    "seed": ({"seed": -1}, "seed", "seed"),
    "metadata": ({"metadata": {str(k): "v" for k in range(17)}}, "metadata", "metadata"),
    "integration": ({"integrations": [{"type": "mlflow"}]}, "integrations", "integrations.0.type"),
    "NUL": ({"metadata": {"a": "\0"}}, "metadata", "metadata.a"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_with_its_place(tenant: Tenant, case: str) -> None:
    options, phrase, param = REFUSED[case]
    body = {"model": "base", "training_file": upload(tenant).id, **options}
    answer = tenant.http.post("/v1/fine_tuning/jobs", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert phrase in error["message"]
    assert error["param"] == param
    assert tenant.http.get("/v1/fine_tuning/jobs").json()["data"] == []


def test_models_and_files_must_be_there_and_the_callers(
    worker: FakeWorker, make_tenant: Callable[..., Tenant]
) -> None:
    one, two = make_tenant(), make_tenant()
    data = upload(one).id
    for param, options in (
        ("model", {"model": "gpt-4o-mini", "training_file": data}),
        ("training_file", {"training_file": upload(two).id}),
        ("validation_file", {"training_file": data, "validation_file": upload(two).id}),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            create(one, **options)
        assert caught.value.param == param
    job = create(one, training_file=data, suffix="birds")
    worker.succeed(worker.claim())
    done = one.openai.fine_tuning.jobs.retrieve(job.id)
    with pytest.raises(openai.BadRequestError, match="is the result of a job"):
        create(one, training_file=done.result_files[0])
    jobs = two.openai.fine_tuning.jobs
    for act in (
        jobs.retrieve,
        jobs.cancel,
        jobs.pause,
        jobs.resume,
        jobs.list_events,
        jobs.checkpoints.list,
    ):
        with pytest.raises(openai.NotFoundError):
            act(job.id)
    assert list(jobs.list()) == []
    assert (
        one.gateway.http(two.key)
        .get(f"/v1/fine_tuning/jobs/{job.id}/events?stream=true")
        .status_code
        == 404
    )
    weak = make_tenant(role="inference")
    with pytest.raises(openai.PermissionDeniedError):
        weak.openai.fine_tuning.jobs.list()


def test_the_method_is_the_datas_own_where_none_is_given(tenant: Tenant) -> None:
    pairs = upload(tenant, jsonl(PAIR)).id
    assert create(tenant, training_file=pairs).method.type == "dpo"  # type: ignore[union-attr]
    asked = create(
        tenant,
        training_file=pairs,
        method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}},
    )
    assert asked.method is not None
    assert asked.method.dpo is not None
    assert asked.method.dpo.hyperparameters is not None
    assert asked.method.dpo.hyperparameters.beta == 0.2
    old = create(tenant, hyperparameters={"n_epochs": 3, "batch_size": "auto"})
    assert (old.method.type, old.hyperparameters.n_epochs) == ("supervised", 3)  # type: ignore[union-attr]
    words = upload(tenant, jsonl({"prompt": "a", "completion": "b"})).id
    with pytest.raises(openai.BadRequestError, match="has preference rows, but method supervised"):
        create(tenant, training_file=words, validation_file=pairs, method={"type": "supervised"})


def test_unfinished_jobs_and_adapters_are_limited(
    worker: FakeWorker, make_tenant: Callable[..., Tenant]
) -> None:
    few = make_tenant(limits={"jobs": 2, "adapters": 1})
    data = upload(few).id
    create(few, training_file=data, suffix="a")
    second = create(few, training_file=data, suffix="a")
    with pytest.raises(openai.RateLimitError, match="2 unfinished jobs"):
        create(few, training_file=data)
    few.openai.fine_tuning.jobs.cancel(second.id)
    worker.succeed(worker.claim())
    with pytest.raises(openai.RateLimitError, match="limit of 1 adapters"):
        create(few, training_file=data, suffix="b")
    create(few, training_file=data, suffix="a")
    waiting = make_tenant(limits={"adapters": 1})
    data = upload(waiting).id
    create(waiting, training_file=data, suffix="a")
    for suffix in ("b", None):  # the job that waits will make the one that is left
        with pytest.raises(openai.RateLimitError, match="limit of 1 adapters"):
            create(waiting, training_file=data, suffix=suffix)
    full = make_tenant(limits={"storage_bytes": len(jsonl())})
    data = upload(full).id
    with pytest.raises(openai.RateLimitError, match="bytes of storage is used up"):
        create(full, training_file=data)
    one_file = make_tenant(limits={"files": 1})
    upload(one_file)
    with pytest.raises(openai.RateLimitError, match="limit of 1 files"):
        upload(one_file)
