"""Jobs that continue from a version, by the `openai` client: every name of one, the structure kept, others' refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.support.gateway.fake_worker import FakeWorker
from tests.support.gateway.harness import Tenant, adapter_files
from tests.support.gateway.uploads import create

_STRUCTURE = {
    "kind": "loreft",
    "rank": 2,
    "layers": [1],
    "positions": "f1+l1",
    "tied": True,
    "activation": "linear",
    "lora_rank": 0,
}


def _method(**hyperparameters: Any) -> dict[str, Any]:
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}


@pytest.fixture
def trained(worker: FakeWorker, tenant: Tenant) -> str:
    """The full name of the first version of `birds`."""
    job = create(tenant, suffix="birds")
    worker.succeed(worker.claim())
    return str(tenant.openai.fine_tuning.jobs.retrieve(job.id).fine_tuned_model)


def test_a_job_continues_from_every_name_of_a_version(
    worker: FakeWorker, tenant: Tenant, trained: str
) -> None:
    version = tenant.http.get("/v1/adapters/birds/versions").json()["data"][0]
    tenant.http.put("/v1/adapters/birds/aliases/staging", json={"version": "1"}).raise_for_status()
    number = version["version"]
    for name, parent in (
        (trained, trained),
        ("birds", trained),
        (f"birds@{number}", trained),
        ("birds@staging", f"{trained}:ckpt-step-1"),
        (f"{trained}:ckpt-step-2", f"{trained}:ckpt-step-2"),
    ):
        job = create(tenant, model=name, method=_method(n_epochs=2))
        assert job.model == parent, name
        claim = worker.claim()
        assert (claim.model, claim.parent_model) == ("base", parent)
        assert claim.hyperparameters == _STRUCTURE | {"n_epochs": 2}
        told = [event.message for event in tenant.openai.fine_tuning.jobs.list_events(job.id).data]
        assert f"The job continues from {parent}: its structure and its weights" in told
        if parent == trained:
            assert claim.parent_digest == version["digest"]
        worker.succeed(claim, 10)


def test_the_structure_can_be_repeated_and_not_changed(tenant: Tenant, trained: str) -> None:
    same = create(tenant, model=trained, method=_method(rank=2, layers=[1], positions="f1+l1"))
    assert same.model == trained
    for name, value, shown in (
        ("rank", 4, "rank is 2 in the model to continue from and cannot become 4"),
        ("kind", "direft", "kind is loreft in"),
        ("layers", "all", "layers is 1 in"),
        ("positions", "l1", "positions is f1+l1 in"),
        ("tied", False, "tied is True in"),
        ("activation", "relu", "activation is linear in"),
        ("lora_rank", 8, "lora_rank is 0 in"),
    ):
        given = {name: value} | ({"positions": "f1+l1"} if name == "tied" else {})
        with pytest.raises(openai.BadRequestError) as refused:
            create(tenant, model=trained, method=_method(**given))
        assert shown in str(refused.value)
        assert refused.value.param == f"method.supervised.hyperparameters.{name}"
    with pytest.raises(openai.BadRequestError) as old:
        create(tenant, model=trained, hyperparameters={"rank": 4})
    assert old.value.param == "hyperparameters.rank"


def test_only_the_owner_can_train_a_version(
    tenant: Tenant, trained: str, make_tenant: Callable[..., Tenant]
) -> None:
    other = make_tenant()
    with pytest.raises(openai.NotFoundError):
        create(other, model=trained)
    tenant.http.put(f"/v1/adapters/birds/shares/{other.id}").raise_for_status()
    with pytest.raises(openai.BadRequestError, match="only its owner can train it") as refused:
        create(other, model=trained)
    assert refused.value.param == "model"


def test_a_version_that_no_job_could_have_made_is_refused(tenant: Tenant) -> None:
    files = adapter_files(7)
    manifest = json.loads(files["reft_config.json"])
    manifest["positions"] = {"spec": "f1+l1", "phase": "all"}
    files["reft_config.json"] = json.dumps(manifest).encode()
    sent = [("files", item) for item in files.items()]
    tenant.http.post("/v1/adapters", data={"name": "odd"}, files=sent).raise_for_status()
    with pytest.raises(openai.BadRequestError, match="edits tokens of phase all") as refused:
        create(tenant, model="odd")
    assert refused.value.param == "model"
