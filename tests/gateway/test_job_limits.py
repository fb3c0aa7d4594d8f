"""A job that is larger than its tenant's limits is refused when it is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from reft_serve.config import GatewaySettings
from tests.support.gateway.harness import Tenant


def ask(tenant: Tenant, rows: int, **hyperparameters: Any) -> Any:
    content = b"".join(
        json.dumps({"prompt": f"p{k}", "completion": "c" * 99}).encode() + b"\n"
        for k in range(rows)
    )
    file = tenant.http.post(
        "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", content)}
    ).json()
    body = {"model": "base", "training_file": file["id"], "hyperparameters": hyperparameters}
    return tenant.http.post("/v1/fine_tuning/jobs", json=body)


@pytest.mark.parametrize(
    ("limits", "hyperparameters", "told"),
    [
        (
            {"job_examples": 39},
            {"n_epochs": 4},
            "about 40 examples in 4 epochs of 10 rows, and the limit job_examples is 39",
        ),
        (
            {"job_examples": 119},
            {},
            "about 120 examples in 12 epochs of 10 rows, and the limit job_examples is 119",
        ),
        (
            {"job_tokens": 100},
            {"n_epochs": 4},
            "tokens in 4 epochs of 10 rows, and the limit job_tokens is 100",
        ),
    ],
    ids=["examples", "auto", "tokens"],
)
def test_a_job_beyond_a_limit_is_refused(
    make_tenant: Callable[..., Tenant],
    limits: dict[str, int],
    hyperparameters: dict[str, int],
    told: str,
) -> None:
    answer = ask(make_tenant(limits=limits), 10, **hyperparameters)
    assert answer.status_code == 400
    assert told in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "hyperparameters.n_epochs"


def test_a_job_within_the_limits_is_taken(make_tenant: Callable[..., Tenant]) -> None:
    assert ask(make_tenant(limits={"job_examples": 40}), 10, n_epochs=4).status_code == 200


def test_a_limit_in_the_environment_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFT_LIMITS__JOB_EXAMPLES", "7")
    limits = GatewaySettings().limits
    assert limits.job_examples == 7
    assert limits.job_hours == GatewaySettings.model_fields["limits"].default.job_hours
    assert limits.jobs is not None
