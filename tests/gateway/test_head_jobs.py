"""Jobs that train a classifier head: which files they learn from, and their settings."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.support.gateway.harness import Tenant
from tests.support.gateway.uploads import PAIR, create, jsonl, upload

LABELLED = jsonl(
    {"text": "a joy", "label": "good"}, {"text": "dull", "text_pair": "x", "label": "bad"}
)
GLUE = jsonl({"sentence": "a joy", "label": 1}, {"sentence": "dull", "label": 0})


def asked(kind: str, **settings: Any) -> dict[str, Any]:
    return {"method": {"type": kind, kind: {"hyperparameters": settings}}}


def test_labelled_rows_are_learnt_by_the_methods_with_a_head(tenant: Tenant) -> None:
    file = upload(tenant, LABELLED)
    assert file.format == "labelled"  # type: ignore[attr-defined]
    assert create(tenant, training_file=file.id).method.type == "classification"  # type: ignore[union-attr]
    settings = {
        "labels": ["bad", "good"],
        "head_reads": "mean",
        "head_activation": "none",
        "rank": 2,
    }
    job = create(tenant, training_file=file.id, **asked("classification", **settings))
    used = job.to_dict()["method"]["classification"]["hyperparameters"]  # type: ignore[index]
    assert {name: used[name] for name in settings} == settings
    assert used["positions"] == "auto"
    assert (
        create(tenant, training_file=upload(tenant, GLUE).id, **asked("regression")).status
        == "queued"
    )
    assert (
        create(tenant, training_file=upload(tenant, jsonl(PAIR)).id, **asked("reward")).status
        == "queued"
    )


@pytest.mark.parametrize(
    ("content", "options", "told"),
    [
        (
            LABELLED,
            asked("supervised"),
            "has labelled rows, but method supervised learns from chat",
        ),
        (
            jsonl(),
            asked("classification"),
            "has chat rows, but method classification learns from labelled or glue rows",
        ),
        (
            LABELLED,
            asked("classification", head_reads="second"),
            '"auto" or one of first, last, mean',
        ),
        (LABELLED, asked("classification", labels=[]), '"auto" or a list of names'),
        (LABELLED, asked("classification", beta=0.1), "beta: unknown field"),
        (
            LABELLED,
            {"method": {"type": "classification", "regression": {}}},
            "it has settings of regression",
        ),
    ],
    ids=["no head", "chats", "reads", "labels", "of another method", "two methods"],
)
def test_what_does_not_fit_a_head_is_refused(
    tenant: Tenant, content: bytes, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        create(tenant, training_file=upload(tenant, content).id, **options)
    assert told in str(refused.value)


def test_a_head_is_trained_from_the_base_model(tenant: Tenant) -> None:
    tenant.upload("birds")
    file = upload(tenant, LABELLED)
    with pytest.raises(openai.BadRequestError, match="starts from the base model"):
        create(tenant, model="birds", training_file=file.id, **asked("classification"))


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"text": "a"}, "label"),
        ({"text": "", "label": "x"}, "text"),
        ({"text": "a", "label": True}, "label"),
        ({"text": "a", "label": {"x": 1}}, "label"),
        ({"text": "a", "label": "x" * 300}, "label"),
    ],
    ids=["no label", "empty text", "a bool", "an object", "a long label"],
)
def test_a_damaged_row_is_named(tenant: Tenant, row: dict[str, Any], told: str) -> None:
    with pytest.raises(openai.BadRequestError, match=r"line 2") as refused:
        upload(tenant, jsonl({"text": "a", "label": "b"}, row))
    assert told in str(refused.value)
