"""Each limit that can be set refuses something, of a tenant and of a key."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from reft_serve.config import TenantLimits
from reft_serve.database.keys import Principal
from reft_serve.errors import RateLimited, RequestInvalid, ServiceError
from reft_serve.gateway.accounting.demand import bounded, demand_of
from reft_serve.gateway.accounting.quotas import Quotas
from reft_serve.observability import BoundedNames
from reft_serve.testing import FakeEngine
from tests.support.gateway.fake_worker import FakeWorker
from tests.support.gateway.harness import Gateway, Tenant
from tests.support.gateway.uploads import jsonl, upload

BODY: dict[str, Any] = {"model": "base", "prompt": "x", "max_tokens": 1}
_Attempt = Callable[[Tenant], int]
_Case = tuple[int, _Attempt, list[int]]


def _complete(**fields: Any) -> _Attempt:
    return lambda tenant: tenant.http.post("/v1/completions", json=BODY | fields).status_code


def _at_once(tenant: Tenant) -> int:
    body = BODY | {"prompt": "slow", "max_tokens": 20}
    with ThreadPoolExecutor(2) as pool:
        codes = list(
            pool.map(lambda _: tenant.http.post("/v1/completions", json=body).status_code, range(2))
        )
    return max(codes)


def _adapter(tenant: Tenant) -> int:
    number = tenant.http.get("/v1/adapters").text.count('"object":"adapter"')
    return tenant.upload(f"a{number}", number).status_code


def _file(tenant: Tenant) -> int:
    parts = {"file": ("rows.jsonl", jsonl())}
    return tenant.http.post("/v1/files", data={"purpose": "fine-tune"}, files=parts).status_code


def _job(tenant: Tenant) -> int:
    body = {"model": "base", "training_file": upload(tenant).id}
    return tenant.http.post("/v1/fine_tuning/jobs", json=body).status_code


# By limit: its value, what is tried, and the statuses of the attempts.
CASES: dict[str, _Case] = {
    "requests_per_minute": (1, _complete(), [200, 429]),
    "tokens_per_minute": (10, _complete(max_tokens=6), [200, 429]),
    "concurrent_requests": (1, _at_once, [429]),
    "adapters": (1, _adapter, [201, 429]),
    "files": (1, _file, [200, 429]),
    "storage_bytes": (len(jsonl()) + 1, _file, [200, 429]),
    "jobs": (1, _job, [200, 429]),
    "choices": (2, _complete(n=3), [400]),
    "output_tokens": (5, _complete(max_tokens=6), [400]),
}
# Tried elsewhere: a worker starts jobs, and what a job may take is known when it is submitted.
_OF_TENANTS = {"running_jobs"}
_TRIED_ELSEWHERE = {
    "management_requests_per_minute": "test_lists.py",
    "keys": "test_lists.py",
    "event_streams": "test_job_events.py",
    "job_examples": "test_job_limits.py",
    "job_tokens": "test_job_limits.py",
    "job_hours": "../training/test_worker.py",
}


def test_every_limit_has_a_test() -> None:
    assert CASES.keys() | _OF_TENANTS | _TRIED_ELSEWHERE.keys() == TenantLimits.model_fields.keys()
    for name, place in _TRIED_ELSEWHERE.items():
        assert f'"{name}"' in (Path(__file__).parent / place).read_text()


@pytest.mark.parametrize("holder", ["tenant", "key"])
@pytest.mark.parametrize("name", CASES)
def test_a_limit_refuses_what_is_beyond_it(
    gateway: Gateway, engine: FakeEngine, make_tenant: Callable[..., Tenant], name: str, holder: str
) -> None:
    value, attempt, expected = CASES[name]
    engine.token_seconds = 0.05 if name == "concurrent_requests" else 0.0
    limits = {name: value}
    tenant = make_tenant(limits=limits if holder == "tenant" else {})
    if holder == "key":
        made = tenant.http.post("/v1/keys", json={"role": "owner", "limits": limits})
        tenant = Tenant(gateway, tenant.id, tenant.name, made.json()["secret"])
    assert [attempt(tenant) for _ in expected] == expected


def test_jobs_that_run_at_once_are_limited(
    worker: FakeWorker, make_tenant: Callable[..., Tenant]
) -> None:
    tenant = make_tenant(limits={"running_jobs": 1})
    assert [_job(tenant) for _ in range(2)] == [200, 200]
    first = worker.claim()
    with pytest.raises(AssertionError):
        worker.claim()
    worker.succeed(first)
    worker.succeed(worker.claim())
    refused = tenant.http.post("/v1/keys", json={"limits": {"running_jobs": 1}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "limits.running_jobs")


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("completions", {"prompt": "x"}, "max_tokens"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "x"}]},
            "max_completion_tokens",
        ),
        ("responses", {"input": "x"}, "max_output_tokens"),
    ],
)
def test_the_length_of_an_answer_is_limited_if_none_is_asked_for(
    engine: FakeEngine,
    make_tenant: Callable[..., Tenant],
    path: str,
    body: dict[str, Any],
    field: str,
) -> None:
    tenant = make_tenant(limits={"output_tokens": 5})
    answer = tenant.http.post(f"/v1/{path}", json={"model": "base", **body}).json()["usage"]
    assert answer.get("completion_tokens", answer.get("output_tokens")) == 5
    assert engine.requests[-1][field] == 5


def test_a_limit_beyond_the_context_of_an_engine_is_sent_as_its_context(
    gateway: Gateway, engine: FakeEngine, make_tenant: Callable[..., Tenant]
) -> None:
    tenant = make_tenant(limits={"output_tokens": 1000})
    (known,) = gateway.served.app.state.services.fleet.engines
    known.context = 7
    try:
        tenant.http.post("/v1/responses", json={"model": "base", "input": "x"})
        assert engine.requests[-1]["max_output_tokens"] == 7
    finally:
        known.context = None


def test_a_request_reserves_for_every_prompt_and_choice(make_tenant: Callable[..., Tenant]) -> None:
    tenant = make_tenant(limits={"tokens_per_minute": 1000})
    batch = BODY | {"prompt": ["x"] * 8, "n": 4, "max_tokens": 40}
    refused = tenant.http.post("/v1/completions", json=batch)
    assert refused.status_code == 429
    assert refused.headers["x-ratelimit-remaining-tokens"] == "1000"
    assert tenant.http.post("/v1/completions", json=batch | {"max_tokens": 20}).status_code == 200
    long = {"model": "base", "input": ["y" * 400] * 11}
    assert tenant.http.post("/v1/embeddings", json=long).status_code == 429


def test_a_demand_counts_prompts_choices_and_texts() -> None:
    fields = ("max_tokens",)
    demand = demand_of({"prompt": ["abcd", "efgh"], "n": 3, "max_tokens": 5}, fields, 16)
    assert (demand.prompt, demand.completion, demand.sequences) == (2, 30, 6)
    assert demand_of({"prompt": [[1, 2], [3]], "max_tokens": 0}, fields, 16).total == 3
    assert demand_of({"prompt": [1, 2, 3]}, fields, 16).total == 19
    assert demand_of({"input": ["abcd"] * 5}, (), 0).total == 5
    assert demand_of({"input": "abcd", "instructions": "y" * 400}, (), 0).total == 101


def test_a_limit_is_named_only_if_the_caller_names_none() -> None:
    limits = TenantLimits(output_tokens=9)
    fields = ("max_completion_tokens", "max_tokens")
    assert bounded(limits, {"max_tokens": 3}, fields, None) == {"max_tokens": 3}
    assert bounded(limits, {}, fields, None) == {"max_completion_tokens": 9}
    assert bounded(limits, {}, ("max_tokens",), 4) == {"max_tokens": 4}
    assert bounded(limits, {"max_tokens": 0}, ("max_tokens",), 4) == {"max_tokens": 0}
    with pytest.raises(RequestInvalid, match="at most 9"):
        bounded(limits, {"max_tokens": 10}, fields, None)


def _caller(**limits: int) -> Principal:
    return Principal("tnt", "acme", "key", "owner", frozenset(), "", limits, {}, None)


def _quotas() -> Quotas:
    return Quotas(TenantLimits(), "async+memory://", BoundedNames(10))


async def _use(counted: Quotas, caller: Principal, estimate: int, tokens: int) -> None:
    async with counted.spend(caller, estimate) as spending:
        await counted.settle(spending, tokens)


@pytest.mark.anyio
async def test_tokens_beyond_several_minutes_are_paid_in_as_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted, caller = _quotas(), _caller(tokens_per_minute=100)
    await _use(counted, caller, 10, 350)
    with pytest.raises(RateLimited) as caught:
        await _use(counted, caller, 1, 1)
    assert 170 < caught.value.retry_after <= 180
    assert caught.value.headers["x-ratelimit-remaining-tokens"] == "0"


@pytest.mark.anyio
async def test_tokens_that_are_learnt_after_the_minute_go_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted, caller, real, ahead = (
        _quotas(),
        _caller(tokens_per_minute=100),
        (time.time, time.monotonic),
        0.0,
    )
    monkeypatch.setattr(time, "time", lambda: real[0]() + ahead)
    monkeypatch.setattr(time, "monotonic", lambda: real[1]() + ahead)
    async with counted.spend(caller, 10) as spending, counted.spend(caller, 50) as refunded:
        ahead = 61.0
        await counted.settle(spending, 90)
        # what was taken of the minute before is not given back to this one
        await counted.settle(refunded, 0)
    async with counted.spend(caller, 1) as later:
        assert later.headers["x-ratelimit-remaining-tokens"] == "19"


@pytest.mark.anyio
async def test_a_clock_that_is_set_back_shuts_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, caller, real, ahead = (
        _quotas(),
        _caller(requests_per_minute=1, tokens_per_minute=100),
        time.time,
        0.0,
    )
    monkeypatch.setattr(time, "time", lambda: real() + ahead)
    await _use(counted, caller, 10, 100)
    with pytest.raises(RateLimited):
        await _use(counted, caller, 10, 10)
    ahead = -7200.0
    await _use(counted, caller, 10, 10)
    ahead = -7200.5  # no more than clocks that are kept right
    with pytest.raises(RateLimited) as caught:
        await _use(counted, caller, 10, 10)
    assert caught.value.retry_after <= 61


@pytest.mark.parametrize(
    "url",
    [
        "redis+wrong://:hunter2@host/0",
        "async+redis://:hunter2@host:port/0",
        "async+redis://:hunter2@[bad/0",
    ],
)
def test_a_storage_that_cannot_be_used_shows_no_password(url: str) -> None:
    with pytest.raises(ServiceError, match="REFT_LIMITS_STORAGE") as caught:
        Quotas(TenantLimits(), url, BoundedNames(10))
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_places_come_back_when_requests_end_together() -> None:
    async def many() -> None:
        counted, caller = _quotas(), _caller(concurrent_requests=3)
        for _ in range(2):
            await asyncio.gather(*(_use(counted, caller, 1, 1) for _ in range(3)))

    asyncio.run(many())
