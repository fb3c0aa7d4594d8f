"""Data files of tenants."""

from __future__ import annotations

import json
from typing import Any

import openai
from openai.types.fine_tuning import FineTuningJob

from tests.support.gateway.harness import Tenant

ROW = {
    "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]
}


def jsonl(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows or [ROW] * 3)


def upload(
    tenant: Tenant, content: bytes = b"", name: str = "rows.jsonl", **options: Any
) -> openai.types.FileObject:
    return tenant.openai.files.create(
        file=(name, content or jsonl()), purpose="fine-tune", **options
    )


PAIR = {
    "input": {"messages": ROW["messages"][:1]},
    "preferred_output": ROW["messages"][1:],
    "non_preferred_output": [{"role": "assistant", "content": "no"}],
}


def create(tenant: Tenant, **options: Any) -> FineTuningJob:
    given: dict[str, Any] = {
        "model": "base",
        "training_file": options.pop("training_file", None) or upload(tenant).id,
    } | options
    return tenant.openai.fine_tuning.jobs.create(**given)
