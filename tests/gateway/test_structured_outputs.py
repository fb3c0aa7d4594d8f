"""Structured outputs that are too large end at the gateway."""

from __future__ import annotations

from typing import Any

import pytest

from reft_serve.testing import FakeEngine
from tests.support.gateway.harness import Tenant

HUGE = {"type": "array", "minItems": 2**31, "prefixItems": [{}, {}]}
MESSAGES = [{"role": "user", "content": "hi"}]
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": HUGE}}
TEXT = {"format": {"type": "json_schema", "name": "x", "schema": HUGE}}
TOOL = {"type": "function", "function": {"name": "x", "parameters": HUGE}}


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("chat/completions", {"messages": MESSAGES, "response_format": FORMAT}, "response_format"),
        ("chat/completions", {"messages": MESSAGES, "tools": [TOOL]}, "tools[0]"),
        (
            "completions",
            {"prompt": "hi", "structured_outputs": {"json": HUGE}},
            "structured_outputs.json",
        ),
        (
            "completions",
            {"prompt": "hi", "structured_outputs": {"choice": ["x"] * 60_000}},
            "structured_outputs.choice",
        ),
        ("responses", {"input": "hi", "text": TEXT}, "text.format"),
    ],
)
def test_a_structured_output_that_is_too_large_reaches_no_engine(
    tenant: Tenant, engine: FakeEngine, path: str, fields: dict[str, Any], param: str
) -> None:
    before = len(engine.requests)
    answer = tenant.http.post(f"/v1/{path}", json={"model": "base", **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, "invalid_request")
    assert "is not supported" in error["message"]
    assert len(engine.requests) == before


def test_a_schema_of_ordinary_size_reaches_the_engine(tenant: Tenant, engine: FakeEngine) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    fields = {
        "messages": MESSAGES,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    }
    assert (
        tenant.http.post("/v1/chat/completions", json={"model": "base", **fields}).status_code
        == 200
    )
    assert engine.requests[-1]["response_format"] == fields["response_format"]
