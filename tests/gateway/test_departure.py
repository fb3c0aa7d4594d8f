"""Callers that leave before the end are charged for what the engine did: in the ledger, in the
minute and in the queue.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from reft_serve.gateway.accounting.demand import Demand
from reft_serve.gateway.engines.tokens import Tokens
from reft_serve.gateway.inference.departure import estimated
from reft_serve.testing import FakeEngine
from tests.support.gateway.harness import Gateway, Tenant, usage_of
from tests.support.waiting import wait_for

WORDS = "word " * 300
REQUESTS: dict[str, dict[str, Any]] = {
    "completions": {"prompt": WORDS, "max_tokens": 400},
    "responses": {"input": WORDS, "max_output_tokens": 400},
}


def leave(tenant: Tenant, path: str, body: dict[str, Any]) -> None:
    with pytest.raises(httpx.ReadTimeout):
        tenant.http.post(f"/v1/{path}", json={"model": "base", **body}, timeout=0.5)


@pytest.mark.parametrize("known", [True, False], ids=["counted", "estimated"])
@pytest.mark.parametrize("path", REQUESTS)
def test_who_leaves_a_whole_answer_pays_for_it(
    gateway: Gateway, engine: FakeEngine, make_tenant: Callable[..., Tenant], path: str, known: bool
) -> None:
    tenant = make_tenant(limits={"tokens_per_minute": 1000})
    engine.token_seconds = 0.05
    fleet = gateway.served.app.state.services.fleet
    kept, engine.left = engine.left, engine.left if known else _Forgetful()
    try:
        leave(tenant, path, REQUESTS[path])
        wait_for(lambda: [each["requests"] for each in usage_of(tenant)] == [1])
    finally:
        engine.left = kept
    (counted,) = usage_of(tenant)
    assert counted["prompt_tokens"] == (300 if known else 375)
    assert 1 <= counted["completion_tokens"] < (60 if known else 401)
    used = counted["prompt_tokens"] + counted["completion_tokens"]
    assert fleet._virtual_time[tenant.id] == used
    engine.token_seconds = 0.0
    wait_for(lambda: _remaining(tenant) == 1000 - used - 1, 3.0)


def _remaining(tenant: Tenant) -> int:
    """What one more request, refused or not, is told."""
    body = {"model": "base", "prompt": "x", "max_tokens": 1000}
    return (
        int(tenant.http.post("/v1/completions", json=body).headers["x-ratelimit-remaining-tokens"])
        - 1
    )


class _Forgetful(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        pass


def test_who_leaves_a_stream_of_responses_pays_for_the_input(
    engine: FakeEngine, tenant: Tenant
) -> None:
    engine.token_seconds = 0.02
    body = {"model": "base", "stream": True, **REQUESTS["responses"]}
    with tenant.http.stream("POST", "/v1/responses", json=body) as answer:
        for count, _ in enumerate(
            line for line in answer.iter_lines() if line.startswith("event: response.output_text")
        ):
            if count == 5:
                break
    wait_for(lambda: [each["requests"] for each in usage_of(tenant)] == [1])
    (counted,) = usage_of(tenant)
    assert counted["prompt_tokens"] == 300
    assert 5 <= counted["completion_tokens"] < 100


def test_who_leaves_the_queue_pays_nothing(
    gateway: Gateway, engine: FakeEngine, tenant: Tenant
) -> None:
    gateway.admin.post("/v1/admin/engines/engine-0/drain")
    try:
        assert (
            tenant.http.post(
                "/v1/completions", json={"model": "base", **REQUESTS["completions"]}
            ).status_code
            == 503
        )
    finally:
        gateway.admin.post("/v1/admin/engines/engine-0/resume")
    (counted,) = usage_of(tenant)
    assert (counted["prompt_tokens"], counted["completion_tokens"]) == (0, 0)


def test_an_estimate_is_bounded_by_time_and_by_what_was_asked_for() -> None:
    demand = Demand(75, 3000, 1)
    assert estimated(demand, Tokens(), 0.1) == Tokens(75, 0, 20)
    assert estimated(demand, Tokens(), 1000.0) == Tokens(75, 0, 3000)
    assert estimated(demand, Tokens(0, 0, 7), 1000.0) == Tokens(75, 0, 7)
    assert estimated(demand, Tokens(80, 60, 7), 1.0) == Tokens(80, 60, 7)


@pytest.mark.parametrize("stream", [True, False])
def test_cached_tokens_are_reported_and_counted(
    engine: FakeEngine, tenant: Tenant, stream: bool
) -> None:
    engine.cached_tokens = 2
    body = {"model": "base", "prompt": "a b c", "max_tokens": 4, "stream": stream}
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if stream else {}
    try:
        answer = tenant.http.post("/v1/completions", json=body | options).text
    finally:
        engine.cached_tokens = 0
    assert '"prompt_tokens_details":{"cached_tokens":2}' in answer
    (counted,) = usage_of(tenant)
    assert (counted["prompt_tokens"], counted["cached_tokens"], counted["completion_tokens"]) == (
        3,
        2,
        4,
    )
